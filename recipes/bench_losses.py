"""Time, memory and exactness of distill's losses beside naive autograd, torch.compile and other libraries.

Prints a Markdown table; bench.json holds every number. One process, with all cores or one GPU.

    accelerate launch recipes/bench_losses.py --quick
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from tqdm.auto import tqdm

from distill import cli, distributed, files
from distill.benchmark import measuring
from distill.benchmark.arms import ARMS, value
from distill.benchmark.cases import HARD_TEMPERATURE, LOSS, Case
from distill.benchmark.measuring import Spread
from distill.benchmark.naive import WITH_BANK, WITH_TEMPERATURE, Batch, entries, exact_gradient, relative_error
from distill.config import at_least
from distill.errors import RecipeError
from distill.export import this_command

Shape = tuple[int, int]
# Rows and columns that each loss is measured at on two cores. Relational losses have the batch for columns.
SHAPES: dict[str, tuple[Shape, ...]] = {
    "cross_contrastive": ((1024, 1024), (4096, 4096), (16384, 16384), (1000, 65537)),
    "symmetric": ((4096, 4096), (1000, 65537)),
    "cross_kl": ((1024, 1024), (4096, 4096), (1000, 65537)),
    "cross_mse": ((2048, 2048), (1000, 65537)),
    "gram_mse": ((1024, 1024), (8192, 8192)),
    "gram_kl": ((1024, 1024), (4096, 4096)),
    "similarity_preserving": ((1024, 1024), (8192, 8192)),
    "cka": ((1024, 1024), (8192, 8192)),
    "rkd_distance": ((1024, 1024), (4096, 4096)),
    "rkd_angle": ((256, 256), (1024, 1024)),
    "rank_hinge": ((128, 128), (1000, 1000)),
}
LARGE, LARGE_LOSSES = (65536, 65536), ("cross_contrastive", "gram_mse")
SMALLER = {"rkd_angle": (64, 64), "rank_hinge": (48, 48)}
# Products of (rows, columns, width) that a loss and its gradient cannot do without. Others are compared with naive autograd.
FLOORS = {"cross_contrastive": 2, "symmetric": 3, "cross_kl": 3, "gram_kl": 3, "rkd_distance": 6}
# What distill is to reach: on two CPU cores, on an H100.
GOALS = {
    "cross_contrastive": ("≤ 1.10", "≤ 1.20"),
    "symmetric": ("≤ 1.15", "≤ 1.25"),
    "cross_kl": ("≤ 1.15", "≤ 1.25"),
    "gram_mse": ("≥ 10x at 8k", "≤ 5 ms at 65k"),
    "cross_mse": ("≥ 8x at 2k", "≤ 0.35 ms at 65k"),
    "rkd_distance": ("≤ 1.30", "≤ 1.40"),
    "rkd_angle": ("≥ 20x at 1k", "≤ 3 ms at 1k"),
    "rank_hinge": ("≤ 700 ms at 1k", "≤ 20 ms at 1k"),
}
# Tensors of its largest size that an arm holds at once, of those that make the matrix; and the share of free memory they may take.
COPIES, SHARE_OF_MEMORY = {"naive": 6, "torch.compile": 6, "one-tile": 3}, 0.7
# Of the floor's product, which beyond a gigabyte is made by chunks of rows.
FLOOR_ENTRIES = 2**28


@dataclass(frozen=True, kw_only=True)
class Recipe:
    losses: tuple[str, ...] = tuple(SHAPES)
    """Which losses."""
    shapes: tuple[Shape, ...] = ()
    """Rows and columns, in pairs: 1000 65537 4096 4096; empty: each loss has its own."""
    arms: tuple[str, ...] = ()
    """Which ways to compute them; empty: all that there are."""
    data: tuple[str, ...] = ()
    """easy: a loss of about 1e-4; hard: 1e-9, temperature .01; empty: both, hard alone if quick."""
    width: int = 768
    """Of all rows."""
    temperature: float = 0.05
    """Of the losses that have one, on easy data."""
    dtype: str = "float32"
    """Of all rows: float32, bfloat16, float16."""
    repeats: int = 20
    """Rounds; each runs all arms."""
    quick: bool = False
    """Tiny shapes, 5 rounds, no torch.compile: does it run? Under a minute."""
    large: bool = False
    """Besides, cross_contrastive and gram_mse at 65,536 x 65,536, one round."""
    output: Path = Path("runs/bench_losses")
    """Folder of bench.json."""

    def __post_init__(self) -> None:
        for name, known in (("losses", SHAPES), ("arms", ARMS), ("data", LOSS)):
            wrong = [value for value in getattr(self, name) if value not in known]
            if wrong:
                raise RecipeError(f"--{name} knows {', '.join(known)}; got {', '.join(wrong)}.")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise RecipeError(f"--dtype is float32, bfloat16 or float16, got {self.dtype}.")
        if not 0 < self.temperature < math.inf:
            raise RecipeError(f"--temperature is above 0, got {self.temperature}.")
        if any(not 2 <= rows <= columns for rows, columns in self.shapes):
            raise RecipeError(
                f"--shapes are rows and columns, at least 2, and as many columns as rows or more; got {self.shapes}."
            )
        if not any(cases(self)):
            raise RecipeError(
                f"{', '.join(self.losses)} compare rows with one another: give --shapes of as many columns as rows."
            )
        at_least(1, "--repeats", self.repeats)
        at_least(2, "--width", self.width)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Of one arm of a case."""

    case: Case
    arm: str
    loss: float
    """Its value."""
    milliseconds: list[float]
    ratios: list[float]
    """Round by round: times the floor, or, for losses without one, times faster than naive autograd."""
    extra_bytes: int | None
    error: float | None
    """Of the gradient, relative to its largest entry."""


def main(recipe: Recipe) -> None:
    if distributed.world_size() > 1:
        raise RecipeError("bench_losses measures one process: add --num_processes 1, or start it with python.")
    cli.record(recipe, recipe.output, leaves=())
    device = distributed.device()
    device = device if device.type == "cuda" else torch.device("cpu")
    found: list[Measured] = []
    left_out: dict[str, None] = {}
    for case in tqdm(list(cases(recipe)), desc="bench_losses", unit="case"):
        found += measure(case.tuned(device), arms(recipe, case), device, left_out)
        write(recipe, found, list(left_out))
    cli.say(f"{measuring.markdown([row(one, device) for one in found])}\n\n{caption(recipe)}\n")
    for line in left_out:
        cli.say(f"Left out: {line}.")


def cases(recipe: Recipe) -> Iterator[Case]:
    data = recipe.data or (("hard",) if recipe.quick else tuple(LOSS))
    for loss in recipe.losses:
        quick = SMALLER.get(loss, (200, 1000) if loss in WITH_BANK else (256, 256))
        shapes = recipe.shapes or ((quick,) if recipe.quick else SHAPES[loss])
        chosen = [(shape, kind) for shape in shapes if loss in WITH_BANK or shape[0] == shape[1] for kind in data]
        if recipe.large and loss in LARGE_LOSSES:
            chosen.append((LARGE, "easy"))
        for shape, kind in chosen:
            yield case_of(recipe, loss, shape, kind)


def case_of(recipe: Recipe, loss: str, shape: Shape, data: str) -> Case:
    return Case(
        loss=loss,
        rows=shape[0],
        columns=shape[1],
        width=min(recipe.width, 128) if recipe.quick else recipe.width,
        temperature=min(recipe.temperature, HARD_TEMPERATURE) if data == "hard" else recipe.temperature,
        dtype=recipe.dtype,
        data=data,
        repeats=1 if shape == LARGE else min(recipe.repeats, 5) if recipe.quick else recipe.repeats,
    )


def arms(recipe: Recipe, case: Case) -> list[str]:
    left_out = {"torch.compile"} if recipe.quick else set()
    if (case.rows, case.columns) == LARGE:
        left_out = ARMS.keys() - {"naive", "distill"}
    chosen = recipe.arms or ARMS.keys() - left_out
    return [arm for arm in ARMS if arm in chosen and case.loss in ARMS[arm][1]]


def measure(case: Case, names: list[str], device: torch.device, left_out: dict[str, None]) -> list[Measured]:
    """All arms of a case, and its floor; `left_out` gets a line for each arm that does not run here, with the reason."""
    batch = case.batch(device)
    exact = exact_gradient(case.loss, batch)
    steps: dict[str, Callable[[], object]] = {floor(case): product(batch)} if case.loss in FLOORS else {}
    errors: dict[str, float] = {}
    for name in names:
        try:
            fits(case, name, device)
            step = ARMS[name][0](case.loss, batch)
            gradient = step()
        except Exception as error:
            if name in ("one-tile", "distill") and not isinstance(error, MemoryError):
                raise
            left_out[f"{name}: {(str(error) or type(error).__name__).splitlines()[0].rstrip('.')}"] = None
            continue
        steps[name] = step
        if exact:
            errors[name] = relative_error(gradient, exact)
    times = measuring.in_turns(steps, case.repeats, device)
    with torch.no_grad():
        loss = float(value(case.loss, batch))
    return [
        Measured(
            case=case,
            arm=name,
            loss=loss,
            milliseconds=[products(case, name) * time for time in times[name]],
            ratios=ratios(case, name, times),
            extra_bytes=memory(case, name, device) if name in ARMS else None,
            error=errors.get(name),
        )
        for name in steps
    ]


def fits(case: Case, arm: str, device: torch.device) -> None:
    """MemoryError, rather than a killed process, for arms that make the whole matrix."""
    free = measuring.available_bytes(device)
    needed = 4 * COPIES.get(arm, 0) * entries(case.loss, case.rows, case.columns, case.width)
    if free is not None and needed > SHARE_OF_MEMORY * free:
        raise MemoryError(f"{case.loss} at {case.rows:,} x {case.columns:,} takes about {needed / 2**30:,.0f} GiB")


def floor(case: Case) -> str:
    return f"{products_of(case):.3g} x torch.mm"


def products_of(case: Case) -> float:
    """Those of FLOORS; both ways, the bank's columns look for no student, and 2 do."""
    return 2 + case.rows / case.columns if case.loss == "symmetric" else FLOORS[case.loss]


def products(case: Case, arm: str) -> float:
    """How many times the floor's one product counts; every other arm once."""
    return 1 if arm in ARMS else products_of(case)


def product(batch: Batch) -> Callable[[], object]:
    """One product of the floor, into memory that is there."""
    student, columns = batch.student.detach(), batch.columns
    height = min(len(student), max(1, FLOOR_ENTRIES // len(columns)))
    out = student.new_empty(height, len(columns))

    def step() -> None:
        for rows in student.split(height):
            torch.mm(rows, columns.T, out=out[: len(rows)])

    return step


def ratios(case: Case, arm: str, times: Mapping[str, list[float]]) -> list[float]:
    if arm not in ARMS or (arm == "naive" and case.loss not in FLOORS):
        return []
    if case.loss in FLOORS:
        pairs = zip(times[arm], times[floor(case)], strict=True)
        return [mine / (products_of(case) * product) for mine, product in pairs]
    return [other / mine for mine, other in zip(times[arm], times.get("naive", []), strict=False)]


def memory(case: Case, arm: str, device: torch.device) -> int | None:
    try:
        return extra(case, arm, device) if device.type == "cuda" else measuring.apart(extra, case, arm, device)
    except MemoryError:
        return None


def extra(case: Case, arm: str, device: torch.device) -> int | None:
    """After a small call, which loads what is loaded once; what is compiled is compiled for its own shape."""
    build, rows = ARMS[arm][0], min(case.rows, 64)
    if arm != "torch.compile":
        build(case.loss, replace(case, rows=rows, columns=rows).batch(device))()
    batch = case.batch(device)
    step = build(case.loss, batch)
    if arm == "torch.compile":
        step()
    return measuring.extra_bytes(step, batch.student)


# What is shown


def write(recipe: Recipe, found: list[Measured], left_out: list[str]) -> None:
    report = {"command": this_command(), "machine": machine(), "left_out": left_out}
    files.write_json(recipe.output / "bench.json", report | {"rows": [asdict(one) for one in found]})


def machine() -> str:
    return measuring.machine("sentence-transformers", "liger-kernel", "cut-cross-entropy")


def caption(recipe: Recipe) -> str:
    return (
        f"`{this_command()}` ({machine()}). Forward and gradient of rows of width "
        f"{min(recipe.width, 128) if recipe.quick else recipe.width}; medians of rounds in which all arms take turns, "
        "quartiles in brackets. Ratio: to the products by torch.mm that the loss cannot do without, lower is better; with "
        "an x, times faster than naive autograd. Memory: beyond the inputs and the gradient. Error: of the gradient against "
        "float64, relative to its largest entry. attention gives the gradient alone; one-tile is distill without tiles."
    )


def row(one: Measured, device: torch.device) -> dict[str, str]:
    case, goals = one.case, GOALS.get(one.case.loss)
    milliseconds = Spread.of(one.milliseconds)
    ratio = Spread.of(one.ratios) if one.ratios else None
    unit = "" if case.loss in FLOORS else "x"
    return {
        "loss": case.loss,
        "shape": f"{case.rows:,} x {case.columns:,}",
        "tau": f"{case.temperature:g}" if case.loss in WITH_TEMPERATURE else "",
        "dtype": case.dtype,
        "data": f"{case.data}, {one.loss:.0e}",
        "arm": one.arm,
        "ms": f"{milliseconds.median:,.{1 if milliseconds.median < 100 else 0}f}",
        "ratio": f"{ratio.median:.2f}{unit} ({ratio.low:.2f}-{ratio.high:.2f})" if ratio else "",
        "goal": goals[device.type == "cuda"] if goals and one.arm == "distill" else "",
        "memory": "" if one.extra_bytes is None else f"{one.extra_bytes / 2**20:,.0f} MB",
        "gradient error": "" if one.error is None else f"{one.error:.1e}",
    }


if __name__ == "__main__":
    cli.run(main, Recipe)
