"""The plainest distillation, to be read first: each text's student vector is pulled to its teacher vector.

accelerate launch recipes/match_embeddings.py --data texts.jsonl --output runs/mine
accelerate launch recipes/match_embeddings.py --data a.txt.gz b.csv --student.kind layers --train.batch-size 32 --train.learning-rate 3e-4
"""

import copy
from dataclasses import dataclass, field
from pathlib import Path

from distill import cli
from distill.config import EvaluationConfig, StudentConfig, TeacherConfig, hold_out
from distill.data import load_texts
from distill.embed import embed
from distill.evaluation import evaluate
from distill.examples import match
from distill.export import Provenance
from distill.losses import CosineDistance
from distill.report import finish
from distill.training import TrainConfig, train


@dataclass(frozen=True, kw_only=True)
class Recipe:
    data: tuple[str, ...]
    """Texts to train on: files (JSONL, CSV, TXT, Parquet, .gz), globs, or Hub data sets as org/name:config:split."""
    column: str | None = None
    """Column of the texts, or several: "sentence1,sentence2"; by position in a CSV without header: "0,1"."""
    limit: int | None = None
    """Train on this many texts at most."""
    held_out: int = 500
    """Of these texts, kept for the fidelity report."""
    store: Path | None = None
    """Folder of the teacher's vectors; None: in the cache, by teacher."""
    output: Path = Path("runs/match_embeddings")
    """Folder of the run."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    train: TrainConfig = field(default_factory=lambda: TrainConfig(epochs=10))
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


def main(recipe: Recipe) -> None:
    cli.record(recipe, recipe.output)
    read = load_texts(recipe.data, column=recipe.column, limit=recipe.limit)
    texts, held_out = hold_out(read.texts, recipe.held_out)
    cli.say(read.report)

    teacher = recipe.teacher.load()
    store = embed(texts, teacher, recipe.store)
    student = recipe.student.build(teacher, store, texts)
    start = copy.deepcopy(student)
    loss = CosineDistance()
    run = train(student, match(texts, student, teacher, store), store, loss, recipe.train, output=recipe.output)

    data = recipe.evaluation.load(held_out)
    scores = evaluate({"untrained start": start, "student": run.student}, teacher, data, store=store.path)
    finish(run, scores, Provenance(teacher=teacher, data=str(read.report), loss=repr(loss)))


if __name__ == "__main__":
    cli.run(main, Recipe)
