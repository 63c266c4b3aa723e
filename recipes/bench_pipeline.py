"""The pipeline beside what people use now: embedding by the teacher, training steps, reading of stored vectors.

Same weights, same texts, same number of updates, one process, all arms taking turns.

Prints a Markdown table; bench.json holds every number.

    accelerate launch recipes/bench_pipeline.py --data texts.jsonl --store store
    accelerate launch recipes/bench_pipeline.py --quick
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, get_args

import numpy as np
import torch
from tqdm.auto import tqdm

from distill import cli, distributed, files
from distill.benchmark import encoding, measuring, reading, stepping
from distill.benchmark.measuring import Spread
from distill.config import StudentConfig, TeacherConfig, at_least
from distill.data import load_texts
from distill.docstrings import docstring_pairs
from distill.embed import embed
from distill.encoder import Encoder
from distill.errors import DistillError, RecipeError
from distill.export import Provenance, export, this_command
from distill.similarity import pairwise_cosine
from distill.store import Store
from distill.store.compression import spread
from distill.training import TrainConfig, match

Part = Literal["teacher", "step", "static", "reading"]
# What is compared beside the time, of each part; and what is counted.
COMPARED = {
    "teacher": "largest difference",
    "step": "1 - cosine after",
    "static": "1 - cosine after",
    "reading": "largest difference",
}
# What an arm needs installed, by its first words, and distill's extra that has it.
PACKAGES = {
    "sentence-transformers": ("sentence_transformers", "peers"),
    "tokenlearn": ("tokenlearn", "peers"),
    "ONNX Runtime": ("onnxscript", "onnx"),
    "OpenVINO": ("openvino", "openvino"),
}
WARM_UP = 5  # updates of a round that are left out of the time


@dataclass(frozen=True, kw_only=True)
class Recipe:
    data: tuple[str, ...] = ()
    """Files (JSONL, CSV, unquoted TSV, TXT, Parquet, .gz), globs, Hub data sets; none: docstrings of the installed packages."""
    column: str | None = None
    """Column of the texts."""
    limit: int = 2048
    """Use this many of the texts, evenly spaced; the teacher embeds them once, into the store, for the training steps."""
    parts: tuple[Part, ...] = get_args(Part)
    """teacher: texts into vectors; step: a transformer student; static: a static one; reading: stored vectors."""
    repeats: int = 5
    """Rounds; each runs all arms."""
    encoded: int = 256
    """Texts that the teacher embeds a round, of all lengths there are."""
    runtimes: tuple[encoding.Runtime, ...] = ()
    """Of the teacher, beside torch; ONNX files are written first (the extras onnx and openvino; a minute or two)."""
    encode_batch_size: int = 32
    """Of SentenceTransformer.encode; its default."""
    steps: int = 30
    """Updates a round of a transformer student, and of a static one ten times as many."""
    batch_size: int = 32
    """Texts an update of a transformer student."""
    static_batch_size: int = 256
    """Texts an update of a static student."""
    learning_rate: float = 3e-4
    """Learning rate of all trainers."""
    mixed_precision: Literal["no", "bf16", "both"] = "no"
    """Of all trainers. both: without it, and distill once more in bf16 (part step). The teacher's is --teacher.compute-dtype."""
    rows: int = 262144
    """Stored vectors that are read from."""
    read_rows: int = 4352
    """Rows of one read, drawn at random: a batch of 256 and a bank of 4,096."""
    width: int = 768
    """Of stored vectors that are read."""
    quick: bool = False
    """Few texts, steps and rows, 2 rounds: does it run? Under a minute with a small teacher."""
    store: Path | None = None
    """Folder of the teacher's vectors; None: in the cache, by teacher."""
    output: Path = Path("runs/bench_pipeline")
    """Folder of bench.json."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    student: StudentConfig = field(default_factory=lambda: StudentConfig(kind="layers"))

    def __post_init__(self) -> None:
        for name in ("repeats", "encoded", "encode_batch_size", "rows", "read_rows", "width"):
            at_least(1, f"--{name.replace('_', '-')}", getattr(self, name))
        at_least(4, "--steps", self.steps)
        at_least(max(self.batch_size, self.static_batch_size), "--limit", self.limit)
        if self.student.kind == "static" or self.student.space is not None:
            raise RecipeError("--student is the transformer of the part step, in the teacher's space.")
        self.training(1)

    def training(self, batch_size: int, steps: int = 1) -> TrainConfig:
        return TrainConfig(
            steps=steps,
            batch_size=batch_size,
            learning_rate=self.learning_rate,
            mixed_precision="bf16" if self.mixed_precision == "bf16" else "no",
        )

    def quickly(self) -> "Recipe":
        """The same in little: what --quick runs."""
        few = {"limit": 64, "repeats": 2, "encoded": 16, "steps": 4, "rows": 4096, "read_rows": 256, "width": 64}
        few |= {"batch_size": 8, "static_batch_size": 16}
        return replace(self, **{name: min(value, getattr(self, name)) for name, value in few.items()})


@dataclass(frozen=True, kw_only=True)
class Measured:
    """An arm of a part: seconds of what is counted, round by round, and what is compared."""

    part: str
    arm: str
    count: int
    seconds: list[float]
    times: list[float]
    """As long as distill takes, round by round."""
    compared: float | None


class Given:
    """What the parts share, each loaded when it is first asked for. `left_out` gets a line for each arm that cannot run."""

    def __init__(self, recipe: Recipe, folder: Path):
        self.recipe, self.folder = recipe, folder
        self.left_out: dict[str, None] = {}

    @cached_property
    def teacher(self) -> Encoder:
        return self.recipe.teacher.load()

    @cached_property
    def texts(self) -> list[str]:
        recipe = self.recipe
        if recipe.data:
            texts = load_texts(recipe.data, column=recipe.column).texts
            return [texts[number] for number in spread(len(texts), recipe.limit)]
        return docstring_pairs(limit=recipe.limit).texts()[: recipe.limit]

    @cached_property
    def store(self) -> Store:
        return embed(self.texts, self.teacher, self.recipe.store)

    def installed(self, arms: Sequence[str]) -> list[str]:
        needs = {arm: PACKAGES.get(arm.partition(",")[0], ("torch", "")) for arm in arms}
        absent = {arm: extra for arm, (package, extra) in needs.items() if find_spec(package) is None}
        self.left_out |= dict.fromkeys(f"{arm}: not installed (extra: {extra})" for arm, extra in absent.items())
        return [arm for arm in arms if arm not in absent]


def main(recipe: Recipe) -> None:
    if distributed.world_size() > 1:
        raise RecipeError("bench_pipeline measures one process: add --num_processes 1, or start it with python.")
    recipe = recipe.quickly() if recipe.quick else recipe
    cli.record(recipe, recipe.output, leaves=())
    found: list[Measured] = []
    with TemporaryDirectory() as folder:
        given = Given(recipe, Path(folder))
        for part in tqdm(recipe.parts, desc="bench_pipeline", unit="part", disable=None):
            found += PARTS[part](given)
            write(recipe, found, list(given.left_out))
    cli.say(f"{measuring.markdown([row(one) for one in found])}\n\n{caption(recipe)}\n")
    for line in given.left_out:
        cli.say(f"Left out: {line}.")


def embedding(given: Given) -> list[Measured]:
    """Texts of all lengths there are into vectors, which are compared with those of the first arm."""
    recipe, by_length = given.recipe, sorted(given.texts, key=len)
    some = [by_length[number] for number in spread(len(by_length), recipe.encoded)]
    size, folder = recipe.encode_batch_size, given.folder
    ways = {**encoding.WAYS, **{name: encoding.RUNTIMES[name] for name in recipe.runtimes}}
    calls = {}
    for arm in given.installed(list(ways)):
        try:
            calls[arm] = ways[arm](given.teacher, some, folder, size)
        except DistillError as error:  # int8 that loses too much, a package that is not there
            given.left_out[f"{arm}: {str(error).partition('; ')[0].rstrip('.')}"] = None
    vectors = {arm: call() for arm, call in calls.items()}  # once before the clock runs
    first = next(iter(vectors.values()))
    differences = {arm: encoding.largest_difference(one, first) for arm, one in vectors.items()}
    return measured("teacher", len(some), measuring.in_turns(calls, recipe.repeats, given.teacher.device), differences)


def transformer_steps(given: Given) -> list[Measured]:
    recipe = given.recipe
    return steps(given, "step", recipe.student, recipe.training(recipe.batch_size, recipe.steps))


def static_steps(given: Given) -> list[Measured]:
    recipe, width = given.recipe, min(256, given.teacher.width)
    config = recipe.training(recipe.static_batch_size, 10 * recipe.steps)
    return steps(given, "static", StudentConfig(kind="static", width=width), config)


def steps(given: Given, part: Part, kind: StudentConfig, config: TrainConfig) -> list[Measured]:
    """Updates of one start; the students after the last round are compared by their distance to the teacher."""
    size = config.batch_size
    kind.check(given.teacher)
    start = kind.build(given.teacher, given.store, given.texts)
    whole = given.texts[: len(given.texts) // size * size]  # so that each batch is as large as another
    job = stepping.Job(
        start=start,
        folder=export(start, given.folder / part, provenance=Provenance(teacher=given.teacher, data="", loss="")),
        examples=match(whole, start, given.teacher, given.store),
        store=given.store,
        config=config,
        warm_up=min(WARM_UP, (config.steps or 1) // 4),
        output=given.folder / f"{part}-runs",
    )
    arms = dict(stepping.STATIC if part == "static" else stepping.TRANSFORMER)
    if given.recipe.mixed_precision != "both":
        arms.pop(stepping.IN_BF16, None)
    runs = measuring.turns({arm: partial(arms[arm], job) for arm in given.installed(list(arms))}, given.recipe.repeats)
    milliseconds = {arm: [1e3 * run.seconds for run in some] for arm, some in runs.items()}
    return measured(part, size, milliseconds, {arm: distance(some[-1].student, job) for arm, some in runs.items()})


def distance(student: Encoder | None, job: stepping.Job) -> float | None:
    """1 - the mean cosine to the teacher, of some of the training texts."""
    if student is None:
        return None
    rows = np.arange(min(256, len(job.examples)))
    vectors = student.encode([job.examples.texts[row] for row in rows])
    return float(1 - pairwise_cosine(vectors, job.vectors(rows)).mean())


def read(given: Given) -> list[Measured]:
    """Ten reads a round, of rows drawn at random, from files in the page cache; what is read is compared with what was written."""
    recipe = given.recipe
    vectors = reading.draw(recipe.rows, recipe.width)
    generator = np.random.Generator(np.random.PCG64(1))
    draws = [generator.integers(0, recipe.rows, recipe.read_rows) for _ in range(10)]
    ways = {arm: write_it(vectors, given.folder) for arm, write_it in reading.WAYS.items()}
    exact = torch.from_numpy(vectors[draws[0]]).float()
    differences = {arm: float((way(draws[0]) - exact).abs().max()) for arm, way in ways.items()}
    calls = {arm: lambda way=way: [way(rows) for rows in draws] for arm, way in ways.items()}
    times = measuring.in_turns(calls, recipe.repeats, torch.device("cpu"))
    return measured("reading", len(draws) * recipe.read_rows, times, differences)


def measured(
    part: Part, count: int, milliseconds: Mapping[str, list[float]], compared: Mapping[str, float | None]
) -> list[Measured]:
    """The first arm is distill's, which the others are measured by."""
    first = next(iter(milliseconds.values()))
    return [
        Measured(
            part=part,
            arm=arm,
            count=count,
            seconds=[time / 1e3 for time in times],
            times=[theirs / mine for theirs, mine in zip(times, first, strict=True)],
            compared=compared[arm],
        )
        for arm, times in milliseconds.items()
    ]


PARTS: dict[Part, Callable[[Given], list[Measured]]] = {
    "teacher": embedding,
    "step": transformer_steps,
    "static": static_steps,
    "reading": read,
}


# What is shown


def write(recipe: Recipe, found: list[Measured], left_out: list[str]) -> None:
    report = {"command": this_command(), "machine": machine(), "left_out": left_out}
    files.write_json(recipe.output / "bench.json", report | {"rows": [asdict(one) for one in found]})


def machine() -> str:
    others = ("sentence-transformers", "tokenlearn", "onnxruntime", "openvino", "datasets", "pyarrow")
    return measuring.machine("transformers", *others)


def caption(recipe: Recipe) -> str:
    return (
        f"`{this_command()}` ({machine()}). Medians of {recipe.repeats} rounds in which all arms take turns, quartiles in "
        f"brackets. Time: as long as distill takes. teacher: {recipe.encoded} texts of all lengths; step: updates of "
        f"{recipe.batch_size} texts of a student of kind {recipe.student.kind}; static: of {recipe.static_batch_size}; both by the "
        f"cosine loss from one start; reading: {recipe.read_rows:,} of {recipe.rows:,} rows of width {recipe.width} at random."
    )


def row(one: Measured) -> dict[str, str]:
    rate, times = Spread.of([one.count / seconds for seconds in one.seconds]), Spread.of(one.times)
    return {
        "part": one.part,
        "arm": one.arm,
        "a second": f"{rate.median:,.{0 if rate.median >= 100 else 1}f} {'rows' if one.part == 'reading' else 'texts'}",
        "time": f"{times.median:.2f} ({times.low:.2f}-{times.high:.2f})",
        "compared": "" if one.compared is None else f"{COMPARED[one.part]} {one.compared:.2g}",
    }


if __name__ == "__main__":
    cli.run(main, Recipe)
