"""CosineLinear on an encoder's vectors: class proxies, a learned sigma, exact accuracy.

With --train-encoder the encoder learns the labels too, and stays in the teacher's space, held by stored vectors.

The teacher's vectors need no label: texts that --shots leaves out are trained on all the same.

OUTPUT/head opens by `head, names = distill.head_folder.load_head("runs/classify/head")`.

    accelerate launch recipes/classify.py --train-data train.csv --test-data test.csv --encoder runs/mine/student
    accelerate launch recipes/classify.py --train-data train.csv --test-data test.csv --encoder runs/mine/student \\
        --train-encoder
"""

import json
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from distill import cli, distributed, files, runlog
from distill.classes import shots
from distill.config import TeacherConfig, unused
from distill.data import Labelled, load_labelled
from distill.embed import embed
from distill.encoder import Encoder
from distill.errors import RecipeError
from distill.evaluation import encode_everywhere
from distill.export import Provenance, export, this_command
from distill.head_folder import save_head
from distill.heads import CosineLinear, classification_loss, parameter_groups
from distill.metrics import bootstrap_interval
from distill.page import REPORT
from distill.similarity import pairwise_cosine
from distill.training import NO_LABEL, LabelConfig, LabelledTexts, LabelTraining


@dataclass(frozen=True, kw_only=True)
class Recipe:
    train_data: str
    """Labelled texts: columns text and label (or category, intent)."""
    test_data: str
    """Labelled texts to measure on."""
    encoder: str = TeacherConfig.name
    """The encoder whose vectors are classified: a student's folder, a Hub name, an installed package."""
    shots: int | None = None
    """Train on this many texts of each class, drawn by seed; None: all."""
    proxies: int = 1
    """Proxies a class."""
    steps: int = 300
    """Of AdamW on the head alone, each over all training vectors."""
    learning_rate: float = 0.01
    """Of the proxies, the encoder being left as it is."""
    sigma_learning_rate: float = 0.1
    """Of sigma, the learned scale of the cosines, likewise."""
    sigma_init: float = 16.0
    """Where sigma starts."""
    max_length: int | None = None
    """Tokens a text is cut at; None: the encoder's own limit."""
    train_encoder: bool = False
    """Train the encoder, too: on the labels, and on the teacher's vectors of all training texts (--labels.*, --teacher.*)."""
    store: Path | None = None
    """Folder of the teacher's vectors; None: in the cache, by teacher."""
    output: Path = Path("runs/classify")
    """Folder of the result."""
    seed: int = 0
    """Of the choice of shots, the proxies, and the order of texts."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    labels: LabelConfig = field(default_factory=LabelConfig)

    def __post_init__(self) -> None:
        wrong = [
            name
            for name in ("shots", "proxies", "steps", "learning_rate", "sigma_learning_rate", "sigma_init")
            if (value := getattr(self, name)) is not None and value <= 0
        ]
        if wrong:
            raise RecipeError(f"{', '.join('--' + name.replace('_', '-') for name in wrong)} must be above 0.")
        if self.train_encoder:
            unused(
                "",
                self,
                ("steps", "learning_rate", "sigma_learning_rate"),
                "--train-encoder has --labels.epochs, --labels.proxy-learning-rate and --labels.sigma-learning-rate.",
            )
        else:
            belong = "they belong to --train-encoder; give it, too."
            unused("", self, ("store",), belong)
            for group in ("labels", "teacher"):
                # but the seed: one script gives it to all its runs
                names = [name for name in vars(getattr(self, group)) if name != "seed"]
                unused(group, getattr(self, group), names, belong)


def main(recipe: Recipe) -> None:
    cli.record(recipe, recipe.output, leaves=("head", "student") if recipe.train_encoder else ("head",))
    torch.manual_seed(recipe.seed)
    data = load_labelled(recipe.train_data, recipe.test_data)
    encoder = Encoder.from_pretrained(recipe.encoder, max_length=recipe.max_length).to(distributed.device())
    chosen = shots(data, recipe.shots, seed=recipe.seed)
    head, more = (
        together(recipe, data, encoder, chosen) if recipe.train_encoder else alone(recipe, data, encoder, chosen)
    )

    test = encode_everywhere(encoder, data.test.texts, progress="test texts")
    right = (head.cpu()(test)["logits"].argmax(dim=1) == torch.tensor(data.test.labels)).double()
    accuracy, sigma = bootstrap_interval(right), head.sigma.detach().item()
    learned = data.texts if recipe.train_encoder else [data.texts[i] for i in chosen]  # an encoder learns all vectors
    report = {
        "encoder": encoder.name,
        "command": this_command(),
        "data": data.sources(),
        "accuracy": vars(accuracy),
        "train_texts": len(chosen),
        "test_texts": len(right),
        "classes": len(data.names),
        "test_texts_seen_in_training": len(set(learned).intersection(data.test.texts)),
        "sigma": sigma,
    }
    distributed.main_first(partial(save_head, head, recipe.output / "head", names=data.names))
    distributed.main_first(partial(files.write_json, recipe.output / REPORT, report | more))
    cli.say(
        f"accuracy {accuracy} (95 % interval) on {len(right):,} texts of {len(data.names)} classes, trained on {len(chosen):,}; "
        f"sigma {sigma:.1f}; {report['test_texts_seen_in_training']:,} test texts are among those of training; written to {recipe.output / REPORT}"
    )


def new_head(recipe: Recipe, width: int, classes: int) -> CosineLinear:
    return CosineLinear(width, classes, recipe.proxies, to_reduce=True, sigma_init=recipe.sigma_init, gamma=10.0)


# The head alone


def alone(recipe: Recipe, data: Labelled, encoder: Encoder, chosen: list[int]) -> tuple[CosineLinear, dict[str, Any]]:
    """Imprint the proxies, then train them and sigma on all vectors at once."""
    vectors = encode_everywhere(encoder, [data.texts[i] for i in chosen], progress="training texts")
    labels = torch.tensor([data.labels[i] for i in chosen])
    head = new_head(recipe, vectors.shape[1], len(data.names))
    head.imprint(vectors, labels)
    optimizer = torch.optim.AdamW(
        parameter_groups(head, lr=recipe.learning_rate, sigma_lr=recipe.sigma_learning_rate, weight_decay=0.0)
    )
    for _ in tqdm(range(recipe.steps), desc="proxies", delay=2, disable=distributed.hides_bars()):
        optimizer.zero_grad()
        classification_loss(head(vectors), labels).backward()
        optimizer.step()
    return head.eval(), {}


# Head and encoder


def together(
    recipe: Recipe, data: Labelled, encoder: Encoder, chosen: list[int]
) -> tuple[CosineLinear, dict[str, Any]]:
    """Train both; leaves OUTPUT/student and metrics.jsonl. The report says how near to the teacher the encoder stays."""
    teacher = recipe.teacher.load(in_roles=False)
    if encoder.width != teacher.width:
        raise RecipeError(
            f"{encoder.name} gives vectors of {encoder.width} numbers and its teacher {teacher.name} of {teacher.width}; "
            "--train-encoder holds one by the other. Give the teacher that it was distilled from (--teacher.name), or "
            "lead it to that width first (match_embeddings.py --student.kind pretrained)."
        )
    store = embed([*data.texts, *data.test.texts], teacher, recipe.store)
    held_out = store.vectors(data.test.texts, prompt=teacher.prompt(None))
    cosines = {"before": float(pairwise_cosine(encode_everywhere(encoder, data.test.texts), held_out).mean())}

    rows = label_rows(data, chosen)
    texts, labels = [data.texts[row] for row in rows], torch.tensor([data.labels[row] for row in rows])
    labels[~torch.isin(torch.tensor(rows), torch.tensor(chosen))] = NO_LABEL
    head = new_head(recipe, encoder.width, len(data.names))
    head.imprint(encode_everywhere(encoder, texts)[labels != NO_LABEL], labels[labels != NO_LABEL])
    training, steps = LabelTraining(encoder, head, recipe.labels.with_seed(recipe.seed)), []
    targets = store.vectors(texts, prompt=teacher.prompt(None))
    training.fit(LabelledTexts.read(encoder, texts, labels, targets), log=steps.append)

    cosines["after"] = float(pairwise_cosine(encode_everywhere(encoder, data.test.texts), held_out).mean())
    provenance = Provenance(teacher=teacher, data=data.source, loss=repr(training.config))
    distributed.main_first(partial(write, recipe.output, encoder, provenance, steps))
    cli.say(f"cosine to the teacher on the test texts: {cosines['before']:.3f} before, {cosines['after']:.3f} after")
    return head.eval(), {"cosine_to_teacher": cosines}


def label_rows(data: Labelled, chosen: list[int]) -> list[int]:
    """All training texts; those with a label as often as makes them about as many as those without."""
    rest = sorted(set(range(len(data))) - set(chosen))
    return chosen * max(1, round(len(rest) / len(chosen))) + rest


def write(output: Path, encoder: Encoder, provenance: Provenance, steps: list[dict[str, Any]]) -> None:
    export(encoder, output / "student", provenance=provenance)
    with files.published_file(output / runlog.NAME) as temporary:
        temporary.write_text("".join(json.dumps(step) + "\n" for step in steps), encoding="utf-8")


if __name__ == "__main__":
    cli.run(main, Recipe)
