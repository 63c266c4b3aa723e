"""Keep your index: its documents stay the teacher's vectors, and only the query encoder becomes small.

The student reads queries and documents in their roles, and is pulled to find each text's teacher vector among a bank.

Later documents are added to the same index by the student: the report's "mixed index", half of each.

Vectors that you have are taken over first:

    python -m distill.embed STORE --teacher NAME --max-length 128 --role document --texts docs.jsonl --vectors docs.npy
    accelerate launch recipes/keep_index.py --store STORE --documents docs.jsonl --queries queries.jsonl \\
        --evaluation.corpus docs.jsonl --evaluation.queries dev-queries.jsonl --evaluation.qrels dev-qrels.txt
"""

import copy
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from distill import cli
from distill.config import (
    EvaluationConfig,
    SidesConfig,
    StudentConfig,
    TeacherConfig,
    at_least,
    describe_start,
    hold_out,
)
from distill.data import load_texts
from distill.embed import embed
from distill.errors import RecipeError
from distill.evaluation import MIXED, START, STUDENT, evaluate
from distill.export import Provenance
from distill.gates import OF_A_RUN, Gate, read_gates
from distill.losses import CosineDistance, CrossContrastive, WeightedSum
from distill.planning import plan
from distill.report import finish
from distill.store import Format
from distill.training import TrainConfig, match, train


@dataclass(frozen=True, kw_only=True)
class Recipe:
    documents: tuple[str, ...]
    """Texts of the index: files, globs, or Hub data sets."""
    queries: tuple[str, ...] = ()
    """Texts like the queries that will come; not those of the evaluation. Without them the documents stand in."""
    column: str | None = None
    """Column of the texts in both."""
    limit: int | None = None
    """Read this many documents, and as many queries, at most."""
    held_out: int | None = None
    """Documents kept for the fidelity report; None: a tenth, 500 at most."""
    store: Path | None = None
    """Folder of the teacher's vectors; `python -m distill.embed` takes over those of an index that exists."""
    store_as: str | None = None
    """How a new store keeps them: float16, int8, pca-K (K columns) or pca-K-int8; the report says what that loses. None: float16."""
    output: Path = Path("runs/keep_index")
    """Folder of the run."""
    temperature: float = 0.07
    """Of the contrastive term."""
    gate: tuple[str, ...] = ()
    """What scores must reach, such as "overlap@10 >= 0.6", "kept ndcg@10 low >= 0.9"; missed: exit code 7, with everything written."""
    plan: bool = False
    """Print the memory, disk and time that this run will need, and stop."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    sides: SidesConfig = field(default_factory=SidesConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    train: TrainConfig = field(default_factory=lambda: TrainConfig(epochs=10.0, learning_rate=2e-3, bank_size=4096))
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        at_least(1, "--limit", self.limit)
        at_least(0, "--held-out", self.held_out)
        Format.parse(self.store_as or "float16")
        self.gates()
        if not self.temperature > 0:
            raise RecipeError(f"--temperature is above 0, got {self.temperature}.")
        if self.sides.of_student() and (self.student.projection == "ridge" or self.student.kind == "pretrained"):
            raise RecipeError(
                "--sides.student-query-prompt and -document-prompt are set when the student is made; a projection is fitted "
                "before (--student.projection ridge, --student.kind pretrained). Write the prompts into its folder, or leave one out."
            )

    def gates(self) -> tuple[Gate, ...]:
        return read_gates(self.gate, self.evaluation.tasks(), (*OF_A_RUN, STUDENT + MIXED))


def main(recipe: Recipe) -> None:
    cli.record(recipe, recipe.output)
    read = load_texts(recipe.documents, column=recipe.column, limit=recipe.limit)
    documents, held_out = hold_out(read.texts, recipe.held_out)
    texts, report = {"document": documents}, f"documents: {read.report}"
    if recipe.queries:
        queries = load_texts(recipe.queries, column=recipe.column, limit=recipe.limit)
        texts["query"], report = queries.texts, f"{report}; queries: {queries.report}"
    data = recipe.evaluation.load(held_out, role="document", training_texts=chain(*texts.values()))
    cli.say(f"{report}; {len(held_out):,} documents held out")

    teacher = recipe.teacher.load(on_device=not recipe.plan)
    recipe.student.check(teacher)
    teacher.prompts |= recipe.sides.of_teacher()
    texts, data = recipe.sides.cut(texts, data, teacher)
    loss = WeightedSum({"cosine": CosineDistance(), "contrastive": CrossContrastive(temperature=recipe.temperature)})
    form = recipe.store_as
    if recipe.plan:
        return plan(teacher, recipe.student, texts, recipe.train, loss, data, store=recipe.store, store_as=form)
    for role, some in texts.items():
        store = embed(some, teacher, recipe.store, role=role, store_as=form)
    space = recipe.student.enter(teacher, store, texts)
    teacher, store = space.teacher, space.store
    student = recipe.student.build(teacher, store, texts)
    student.prompts |= recipe.sides.of_student()
    student.max_length = recipe.sides.limit(student)
    cli.say(describe_start(student, teacher, store, texts))
    start = copy.deepcopy(student)
    run = train(student, match(texts, student, teacher, store), store, loss, recipe.train, output=recipe.output)

    systems = {START: start, STUDENT: run.student}
    scores = evaluate(systems, teacher, data, store=store.path, mixed_index=[STUDENT])
    finish(
        run,
        scores,
        Provenance(teacher=teacher, data=report, loss=repr(loss), space=space),
        gates=recipe.gates(),
    )


if __name__ == "__main__":
    cli.run(main, Recipe)
