"""CosineLinear on an encoder's vectors: class proxies, a learned sigma, exact accuracy.

accelerate launch recipes/classify.py --train-data train.csv --test-data test.csv --encoder runs/quickstart/student
"""

from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from tqdm.auto import tqdm

from distill import cli, distributed, files
from distill.config import TeacherConfig
from distill.data import Labelled, load_labelled
from distill.encoder import Encoder
from distill.errors import RecipeError
from distill.evaluation import encode_everywhere
from distill.export import this_command
from distill.heads import CosineLinear, classification_loss, parameter_groups
from distill.metrics import bootstrap_interval


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
    """Of AdamW, each over all training vectors."""
    learning_rate: float = 0.01
    """Of the proxies."""
    sigma_learning_rate: float = 0.1
    """Of sigma, the learned scale of the cosines."""
    sigma_init: float = 16.0
    """Where sigma starts."""
    max_length: int | None = None
    """Tokens a text is cut at; None: the encoder's own limit."""
    output: Path = Path("runs/classify")
    """Folder of the result."""
    seed: int = 0
    """Of the choice of shots and the proxies."""

    def __post_init__(self) -> None:
        wrong = [
            name
            for name in ("shots", "proxies", "steps", "learning_rate", "sigma_learning_rate", "sigma_init")
            if (value := getattr(self, name)) is not None and value <= 0
        ]
        if wrong:
            raise RecipeError(f"{', '.join('--' + name.replace('_', '-') for name in wrong)} must be above 0.")


def main(recipe: Recipe) -> None:
    cli.record(recipe, recipe.output)
    torch.manual_seed(recipe.seed)
    data = load_labelled(recipe.train_data, recipe.test_data)
    encoder = Encoder.from_pretrained(recipe.encoder, max_length=recipe.max_length).to(distributed.device())
    chosen = shots(data, recipe.shots, recipe.seed)
    vectors = encode_everywhere(encoder, [data.texts[i] for i in chosen], progress="training texts")
    head = fit(recipe, vectors, torch.tensor([data.labels[i] for i in chosen]), len(data.names))

    test = encode_everywhere(encoder, data.test.texts, progress="test texts")
    right = (head(test)["logits"].argmax(dim=1) == torch.tensor(data.test.labels)).double()
    accuracy = bootstrap_interval(right)
    report = {
        "encoder": encoder.name,
        "command": this_command(),
        "accuracy": vars(accuracy),
        "train_texts": len(chosen),
        "test_texts": len(right),
        "classes": len(data.names),
        "sigma": float(head.sigma),
    }
    distributed.main_first(partial(files.write_json, recipe.output / "report.json", report))
    cli.say(
        f"accuracy {accuracy} (95 % interval) on {len(right):,} texts of {len(data.names)} classes, trained on {len(chosen):,}; "
        f"sigma {float(head.sigma):.1f}; written to {recipe.output / 'report.json'}"
    )


def shots(data: Labelled, count: int | None, seed: int) -> list[int]:
    """Numbers of `count` texts of each class, drawn by seed; of all without a count."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed)).tolist()
    seen: Counter[int] = Counter()
    chosen = []
    for number in order:
        seen[data.labels[number]] += 1
        if count is None or seen[data.labels[number]] <= count:
            chosen.append(number)
    return chosen


def fit(recipe: Recipe, vectors: torch.Tensor, labels: torch.Tensor, classes: int) -> CosineLinear:
    """Imprint the proxies, then train them and sigma on all vectors at once."""
    head = CosineLinear(
        vectors.shape[1], classes, recipe.proxies, to_reduce=True, sigma_init=recipe.sigma_init, gamma=10.0
    )
    head.imprint(vectors, labels)
    optimizer = torch.optim.AdamW(
        parameter_groups(head, lr=recipe.learning_rate, sigma_lr=recipe.sigma_learning_rate, weight_decay=0.0)
    )
    for _ in tqdm(range(recipe.steps), desc="proxies", delay=2, disable=None):
        optimizer.zero_grad()
        classification_loss(head(vectors), labels).backward()
        optimizer.step()
    return head.eval()


if __name__ == "__main__":
    cli.run(main, Recipe)
