"""How much each sweep does, in one place: all of it (`pytest -m slow tests/faults`), and the sample of the default run.

What was done is told at the end of a run, one line a target: `note` collects it, conftest.py prints it, all workers' together.
"""

from dataclasses import dataclass

# Each sweep: the whole, and the sample. "calls": of each save path in each mode; all there are, if they are fewer.
FULL = {
    "calls": 100_000,
    "bytes": 40,
    "kills": 520,
    "resumed steps": 39,
    "flips": 2000,
    "truncation": 16,
    "recipes": 100_000,
    "corpora": 20_000,
    "manifests": 50_000,
}
SAMPLE = {
    "calls": 2,
    "bytes": 3,
    "kills": 8,
    "resumed steps": 3,
    "flips": 40,
    "truncation": 512,
    "recipes": 1000,
    "corpora": 200,
    "manifests": 500,
}

TARGETS = {
    1: "kill",
    2: "resume, bitwise",
    3: "elastic",
    4: "gradients",
    5: "corruption",
    6: "identity",
    7: "bad input",
    8: "concurrency",
    9: "ranks",
    10: "security",
    11: "offline",
}


@dataclass(frozen=True)
class Line:
    """What one sweep did: of which target, what, how often, and how often it was not as promised."""

    target: int
    what: str
    count: int
    failures: int


LINES: list[Line] = []


def amount(name: str, full: bool) -> int:
    return (FULL if full else SAMPLE)[name]


def note(target: int, what: str, count: int, failures: int = 0) -> None:
    LINES.append(Line(target, what, count, failures))


def table() -> list[str]:
    """The lines that were noted, those of one sweep added up."""
    sums: dict[tuple[int, str], list[int]] = {}
    for line in LINES:
        total = sums.setdefault((line.target, line.what), [0, 0])
        total[0] += line.count
        total[1] += line.failures
    rows = [
        f"{n:>2} {TARGETS[n]:<16} {what:<72} {count:>8,} {bad:>8,}" for (n, what), (count, bad) in sorted(sums.items())
    ]
    return [f"{'target':<19} {'what':<72} {'count':>8} {'failures':>8}", *rows] if rows else []
