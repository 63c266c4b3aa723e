"""The main job in minutes, from installed packages alone: a 768-d teacher, the docstrings on this machine, a student.

accelerate launch recipes/quickstart.py
accelerate launch recipes/quickstart.py --student layers --steps 200
"""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from distill import cli
from distill.config import SUITED, StudentConfig, TeacherConfig, describe_start
from distill.docstrings import docstring_pairs
from distill.embed import embed
from distill.errors import RecipeError
from distill.evaluation import START, STUDENT, EvaluationData, evaluate, task_scores
from distill.export import Provenance
from distill.gates import Gate, read_gates
from distill.losses import CrossContrastive
from distill.planning import plan
from distill.report import finish
from distill.training import TrainConfig, match, train


@dataclass(frozen=True, kw_only=True)
class Recipe:
    teacher: str = TeacherConfig.name
    """A local folder or a name on the Hub, whose weights may come from an installed package."""
    texts: int = 3000
    """Texts to train on."""
    held_out: int = 300
    """Pairs of summary and description kept for the report, from packages that are not trained on."""
    student: Literal["static", "layers"] = "static"
    """static: a table of token vectors; layers: a transformer of the teacher's layers 0, 1 and the last."""
    steps: int | None = None
    """Optimizer steps; None: 10 passes over the texts for a static student, 1 for layers."""
    output: Path = Path("runs/quickstart")
    """Folder of the run."""
    store: Path | None = None
    """Folder of the teacher's vectors; None: in the cache, by teacher. A second run reads them."""
    gate: tuple[str, ...] = ()
    """What scores must reach, such as "overlap@10 >= 0.6", "kept ndcg@10 low >= 0.9"; missed: exit code 7, with everything written."""
    seed: int = 0
    """Of the choice of texts and their order."""
    resume: bool = False
    """Go on from the newest checkpoint of the output folder."""
    plan: bool = False
    """Print the memory, disk and time that this run will need, and stop."""

    def __post_init__(self) -> None:
        if self.texts < 16 or self.held_out < 16:
            raise RecipeError(f"--texts and --held-out are 16 or more, got {self.texts} and {self.held_out}.")
        self.training()
        self.gates()

    def gates(self) -> tuple[Gate, ...]:
        return read_gates(self.gate, task_scores(retrieval=[""]))

    def training(self) -> TrainConfig:
        common = {"steps": self.steps, "seed": self.seed, "resume": self.resume}
        epochs = 10.0 if self.student == "static" else 1.0
        batch_size, rate = SUITED.get(self.student, (256, 2e-3))
        return TrainConfig(epochs=epochs, batch_size=batch_size, learning_rate=rate, bank_size=4096, **common)


def main(recipe: Recipe) -> None:
    cli.record(recipe, recipe.output)
    teacher = TeacherConfig(name=recipe.teacher).load(on_device=not recipe.plan, in_roles=False)
    pairs = recipe.texts // 2 + recipe.held_out
    learned, held_out = docstring_pairs(limit=pairs, seed=recipe.seed).split(recipe.held_out / pairs, seed=recipe.seed)
    texts = learned.texts()[: recipe.texts]
    cli.say(f"training on {len(texts):,} texts of {learned}\nheld out: {held_out}")

    kind, loss = StudentConfig(kind=recipe.student), CrossContrastive(temperature=0.07)
    data = EvaluationData(texts=held_out.texts(), retrieval={"": held_out.retrieval()})
    if recipe.plan:
        return plan(teacher, kind, texts, recipe.training(), loss, data, store=recipe.store)
    store = embed(texts, teacher, recipe.store)
    student = kind.build(teacher, store, texts)
    cli.say(describe_start(student, teacher, store, texts))
    start = copy.deepcopy(student)
    run = train(student, match(texts, student, teacher, store), store, loss, recipe.training(), output=recipe.output)

    scores = evaluate({START: start, STUDENT: run.student}, teacher, data, store=store.path)
    provenance = Provenance(teacher=teacher, data=f"docstrings: {learned}", loss=repr(loss))
    finish(run, scores, provenance, gates=recipe.gates())


if __name__ == "__main__":
    cli.run(main, Recipe)
