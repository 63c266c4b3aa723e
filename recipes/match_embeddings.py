"""The plainest distillation, to be read first: each text's student vector is pulled to its teacher vector.

    accelerate launch recipes/match_embeddings.py --data texts.jsonl --output runs/mine

Some of the teacher's layers, in place of a table of token vectors:

    accelerate launch recipes/match_embeddings.py --data a.txt.gz b.csv --student.kind layers
"""

import copy
from dataclasses import dataclass, field
from pathlib import Path

from distill import cli
from distill.config import (
    EvaluationConfig,
    JoinConfig,
    StudentConfig,
    TeacherConfig,
    at_least,
    describe_start,
    hold_out,
)
from distill.data import load_texts
from distill.embed import embed
from distill.evaluation import START, STUDENT, evaluate
from distill.export import Provenance
from distill.gates import Gate, read_gates
from distill.losses import CosineDistance
from distill.planning import plan
from distill.report import finish
from distill.store import Format
from distill.training import TrainConfig, match, train


@dataclass(frozen=True, kw_only=True)
class Recipe:
    data: tuple[str, ...]
    """Files (JSONL, CSV, unquoted TSV, TXT, Parquet, .gz), globs, saved datasets, Hub data sets as org/name@REVISION:config:split."""
    column: str | None = None
    """Column of the texts, or several: "sentence1,sentence2"; by place: "0,1"."""
    limit: int | None = None
    """Read this many texts at most."""
    held_out: int | None = None
    """Texts kept for the fidelity report; None: a tenth, 500 at most."""
    store: Path | None = None
    """Folder of the teacher's vectors; None: in the cache, by teacher."""
    store_as: str | None = None
    """How a new store keeps them: float16, int8, pca-K (K columns) or pca-K-int8; the report says what that loses. None: float16."""
    output: Path = Path("runs/match_embeddings")
    """Folder of the run."""
    gate: tuple[str, ...] = ()
    """What scores must reach, such as "overlap@10 >= 0.6", "kept ndcg@10 low >= 0.9"; missed: exit code 7, with everything written."""
    plan: bool = False
    """Print the memory, disk and time that this run will need, and stop."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    join: JoinConfig = field(default_factory=JoinConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    train: TrainConfig = field(default_factory=lambda: TrainConfig(epochs=10.0))
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        at_least(1, "--limit", self.limit)
        at_least(0, "--held-out", self.held_out)
        Format.parse(self.store_as or "float16")
        self.join.check(self.teacher, self.student, plan=self.plan)
        self.train.check_bank(CosineDistance())
        self.gates()

    def gates(self) -> tuple[Gate, ...]:
        return read_gates(self.gate, self.evaluation.tasks())


def main(recipe: Recipe) -> None:
    cli.record(recipe, recipe.output)
    read = load_texts(recipe.data, column=recipe.column, limit=recipe.limit)
    texts, held_out = hold_out(read.texts, recipe.held_out)
    data = recipe.evaluation.load(held_out, training_texts=texts)
    cli.say(f"{read.report}; {len(held_out):,} held out")

    teacher = recipe.teacher.load(on_device=not recipe.plan, in_roles=False)
    recipe.student.check(teacher)
    loss, form = CosineDistance(), recipe.store_as
    if recipe.plan:
        return plan(teacher, recipe.student, texts, recipe.train, loss, data, store=recipe.store, store_as=form)
    others = recipe.join.load(recipe.teacher, teacher, form)
    store = embed(texts, teacher, recipe.store, store_as=form)
    space = recipe.join.enter(recipe.student.enter(teacher, store, texts), others, texts, recipe.store, form)
    teacher, store = space.teacher, space.store
    student = recipe.student.build(teacher, store, texts, own=space.own)
    cli.say(describe_start(student, teacher, store, texts))
    start = copy.deepcopy(student)
    run = train(student, match(texts, student, teacher, store), store, loss, recipe.train, output=recipe.output)

    systems = {START: start, STUDENT: run.student}
    scores = evaluate(systems, teacher, data, store=space.own.path, several=space.several)
    finish(
        run,
        scores,
        Provenance(teacher=teacher, data=str(read.report), loss=repr(loss), space=space),
        gates=recipe.gates(),
    )


if __name__ == "__main__":
    cli.run(main, Recipe)
