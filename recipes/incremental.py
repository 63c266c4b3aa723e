"""Classes that come task after task: new intents are learned, and the old ones are to stay.

The old model is the teacher: while new classes are learned, vectors are pulled to those of before (Hou et al. 2019).

The proxies of old classes stay. Beside it: fine-tuning without either, fixed proxies alone, and a frozen encoder.

    accelerate launch recipes/incremental.py --train-data train.csv --test-data test.csv --encoder runs/mine/student
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from distill import cli, distributed, files, plots
from distill.benchmark.measuring import markdown
from distill.classes import hold_out_of_each, in_tasks
from distill.config import at_least
from distill.data import Labelled, load_labelled
from distill.encoder import Encoder
from distill.errors import RecipeError
from distill.evaluation import encode_everywhere
from distill.export import this_command
from distill.heads import CosineLinear
from distill.metrics import average_incremental_accuracy, forgetting, seen_accuracy
from distill.page import REPORT
from distill.training import LabelConfig, LabelledTexts, LabelTraining, herd


@dataclass(frozen=True, kw_only=True)
class Way:
    """What differs between the ways of learning that are compared."""

    trained: bool = True
    fixed_proxies: bool = False
    pulled: bool = False


WAYS = {
    "fine-tuning": Way(),
    "fixed proxies": Way(fixed_proxies=True),
    "less-forget": Way(fixed_proxies=True, pulled=True),
    "frozen encoder": Way(trained=False),
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    train_data: str
    """Labelled texts: columns text and label (or category, intent)."""
    encoder: str
    """The model that begins: a student's folder, a Hub name, an installed package."""
    test_data: str | None = None
    """Labelled texts to measure on; None: a fifth of each class's training texts, to choose settings by."""
    tasks: int = 7
    """In how many tasks the classes come."""
    memory: int = 0
    """Texts of each class that are kept, and trained again with later tasks."""
    ways: tuple[str, ...] = tuple(WAYS)
    """Which ways of learning to compare."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the order of classes and of texts; each runs all ways."""
    sigma_init: float = 16.0
    """Where sigma, the learned scale of the cosines, starts."""
    output: Path = Path("runs/incremental")
    """Folder of the result."""
    labels: LabelConfig = field(
        default_factory=lambda: LabelConfig(epochs=4.0, proxy_learning_rate=1e-3, distillation=100.0)
    )

    def __post_init__(self) -> None:
        unknown = [name for name in self.ways if name not in WAYS]
        if unknown or not self.ways:
            raise RecipeError(f"--ways knows {', '.join(WAYS)}; got {', '.join(unknown) or 'none'}.")
        if len(set(self.ways)) < len(self.ways):
            raise RecipeError(f"--ways are different, got {', '.join(self.ways)}.")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or not self.sigma_init > 0:
            raise RecipeError(
                f"--seeds are different numbers and --sigma-init is above 0, got {self.seeds}, {self.sigma_init}."
            )
        at_least(2, "--tasks", self.tasks)
        at_least(0, "--memory", self.memory)


def main(recipe: Recipe) -> None:
    cli.record(recipe, recipe.output, leaves=())
    read = load_labelled(recipe.train_data, recipe.test_data)
    data = read if read.test else hold_out_of_each(read)
    drawn = {seed: in_tasks(data, recipe.tasks, seed=seed) for seed in recipe.seeds}
    encoder = Encoder.from_pretrained(recipe.encoder).to(distributed.device())
    found: dict[str, list[Tensor]] = {way: [] for way in recipe.ways}
    sizes: list[Tensor] = []
    for seed, tasks in drawn.items():
        sizes.append(torch.tensor([len(task.test) for task in tasks]))
        for way in recipe.ways:
            found[way].append(learn(recipe, way, seed, copy.deepcopy(encoder), tasks))
            cli.say(f"seed {seed}, {way}: {average_incremental_accuracy(found[way][-1], sizes[-1]):.3f}")
    about = {"command": this_command(), "data": read.sources(), "seeds": recipe.seeds}
    about |= {"classes": [len(task.names) for task in tasks]}
    report = about | {"ways": {way: numbers(matrices, sizes) for way, matrices in found.items()}}
    distributed.main_first(partial(write, recipe.output, report, found))
    cli.say(f"\n{table(report['ways'])}\n\nall numbers are in {recipe.output / 'report.json'}")


def learn(recipe: Recipe, way: str, seed: int, encoder: Encoder, tasks: Sequence[Labelled]) -> Float[Tensor, "s s"]:
    """Row t: the accuracy on each task so far, after task t. Any class seen so far is a possible answer."""
    torch.manual_seed(seed)
    pull = recipe.labels.distillation if WAYS[way].pulled else 0.0
    head = CosineLinear(encoder.width, len(tasks[0].names), sigma_init=recipe.sigma_init)
    training = LabelTraining(encoder, head, replace(recipe.labels.with_seed(seed), distillation=pull))
    kept: list[tuple[str, int]] = []
    accuracy = torch.full((len(tasks), len(tasks)), torch.nan)
    for number, task in enumerate(tasks):
        if number:
            training.add_classes(len(task.names))
        rows = [*zip(task.texts, task.labels, strict=True), *kept]
        texts, labels = [text for text, _ in rows], torch.tensor([label for _, label in rows])
        old = encode_everywhere(encoder, texts)  # the old model's vectors: the teacher's of this task
        head.imprint(old[: len(task)], labels[: len(task)])
        if WAYS[way].trained:
            fixed = min(task.labels) if WAYS[way].fixed_proxies else 0
            batch = LabelledTexts.read(encoder, texts, labels, old)
            training.fit(batch, fixed_classes=fixed, progress=f"{way}, task {number + 1}")
        for earlier, one in enumerate(tasks[: number + 1]):
            accuracy[number, earlier] = accuracy_on(training, one.test)
        if recipe.memory:
            chosen = herd(encode_everywhere(encoder, task.texts), torch.tensor(task.labels), recipe.memory).tolist()
            kept += [rows[place] for place in chosen]
    return accuracy


def accuracy_on(training: LabelTraining, data: Labelled) -> Float[Tensor, ""]:
    found = training.predict(encode_everywhere(training.encoder, data.texts))
    return (found == torch.tensor(data.labels)).float().mean()


# What is shown


def numbers(matrices: Sequence[Tensor], sizes: Sequence[Tensor]) -> dict[str, Any]:
    """What the matrices of the seeds come to, and they themselves, row by row up to the diagonal."""
    seen = [seen_accuracy(one, size) for one, size in zip(matrices, sizes, strict=True)]
    return {
        "average incremental accuracy": [float(one.mean()) for one in seen],
        "accuracy after the last task": [float(one[-1]) for one in seen],
        "forgetting": [forgetting(one) for one in matrices],
        "accuracy after each task": [one.tolist() for one in seen],
        "accuracy of each task": [[row[: t + 1] for t, row in enumerate(one.tolist())] for one in matrices],
    }


def table(ways: Mapping[str, Mapping[str, Any]]) -> str:
    """The mean over seeds of each number, with the lowest and the highest."""
    names = ("average incremental accuracy", "accuracy after the last task", "forgetting")
    return markdown([{"": way} | {name: spread(found[name]) for name in names} for way, found in ways.items()])


def spread(values: Sequence[float]) -> str:
    return f"{fmean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def write(output: Path, report: Mapping[str, Any], found: Mapping[str, Sequence[Tensor]]) -> None:
    """report.json, and two pictures where matplotlib is installed."""
    files.write_json(output / REPORT, dict(report))
    seen = {way: torch.tensor(one["accuracy after each task"]) for way, one in report["ways"].items()}
    try:
        plots.accuracy_over_tasks(seen, classes_a_task=report["classes"]).savefig(output / "accuracy.svg")
        means = {way: torch.stack(list(some)).mean(0) for way, some in found.items()}
        plots.accuracy_matrices(means).savefig(output / "matrices.svg")
    except ImportError:
        cli.say("No pictures: matplotlib is not installed (pip install matplotlib).")


if __name__ == "__main__":
    cli.run(main, Recipe)
