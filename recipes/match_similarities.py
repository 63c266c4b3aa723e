"""match_embeddings, and one idea more: similarities to a bank of stored teacher vectors are matched, too.

The bank costs no teacher pass: its rows come from the store. Other terms count once they are given a weight.

    accelerate launch recipes/match_similarities.py --data texts.jsonl --train.bank-size 16384
"""

import copy
from dataclasses import dataclass, field, replace
from pathlib import Path

from distill import cli
from distill.config import (
    EvaluationConfig,
    JoinConfig,
    LossConfig,
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
from distill.planning import plan
from distill.report import finish
from distill.store import Format, Store
from distill.training import Examples, TrainConfig, calibrate, match, train


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
    output: Path = Path("runs/match_similarities")
    """Folder of the run."""
    gate: tuple[str, ...] = ()
    """What scores must reach, such as "overlap@10 >= 0.6", "kept ndcg@10 low >= 0.9"; missed: exit code 7, with everything written."""
    plan: bool = False
    """Print the memory, disk and time that this run will need, and stop."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    join: JoinConfig = field(default_factory=JoinConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            epochs=5.0, learning_rate=2e-3, schedule="constant", ema_decay=0.995, bank_size=4096
        )
    )
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        at_least(1, "--limit", self.limit)
        at_least(0, "--held-out", self.held_out)
        Format.parse(self.store_as or "float16")
        self.join.check(self.teacher, self.student, plan=self.plan)
        self.train.check_bank(self.loss)
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
    if not recipe.join.teachers:  # whose vectors have a width of their own
        recipe.loss.check(recipe.student.space or teacher.width)
    form = recipe.store_as
    if recipe.plan:
        loss = planned(recipe.loss).build(recipe.student.space or teacher.width)
        return plan(teacher, recipe.student, texts, recipe.train, loss, data, store=recipe.store, store_as=form)
    others = recipe.join.load(recipe.teacher, teacher, form)
    store = embed(texts, teacher, recipe.store, store_as=form)
    space = recipe.join.enter(recipe.student.enter(teacher, store, texts), others, texts, recipe.store, form)
    teacher, store = space.teacher, space.store
    student = recipe.student.build(teacher, store, texts, own=space.own)
    cli.say(describe_start(student, teacher, store, texts))
    start = copy.deepcopy(student)
    examples = match(texts, student, teacher, store)
    loss = calibrated(recipe, examples, store)
    run = train(student, examples, store, loss.build(store.width), recipe.train, output=recipe.output)

    systems = {START: start, STUDENT: run.student}
    scores = evaluate(systems, teacher, data, store=space.own.path, several=space.several)
    finish(
        run,
        scores,
        Provenance(teacher=teacher, data=str(read.report), loss=repr(loss), space=space),
        gates=recipe.gates(),
    )


def planned(loss: LossConfig) -> LossConfig:
    """With a number for the temperature, which costs the same whatever it is."""
    return replace(loss, temperature=0.05) if loss.temperature == "auto" else loss


def calibrated(recipe: Recipe, examples: Examples, store: Store) -> LossConfig:
    """The loss with a number for its temperature."""
    if recipe.loss.temperature != "auto":
        return recipe.loss
    found = calibrate(
        examples,
        store,
        perplexity=recipe.loss.perplexity,
        columns=recipe.train.batch_size + recipe.train.bank_size,
        seed=recipe.train.seed,
        output=recipe.output,
    )
    cli.say(found)
    return replace(recipe.loss, temperature=found.temperature)


if __name__ == "__main__":
    cli.run(main, Recipe)
