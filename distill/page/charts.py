"""Charts as plain geometry, for templates to draw: positions are percent of the width, so that text keeps its size on a phone."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

# A tone is a class of style.css: what a system looks like wherever it is drawn.
TONES = ("run-1", "run-2", "run-3", "run-4", "run-5", "run-6")
MOST_POINTS = 240  # of a line
Number = int | float  # JSON has both


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A value with its interval, each in percent of the width; no interval: low and high are the value."""

    tone: str
    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a chart: what it is, its numbers as text, and its marks, the first one the row's own."""

    label: str
    text: str
    marks: list[Mark]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Rows under a heading."""

    heading: str
    rows: list[Row]


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Bars from the left edge, or dots; `ticks` are (percent, label), `line` the percent of a line that is looked for."""

    name: str
    title: str
    kind: str
    groups: list[Group]
    ticks: list[tuple[float, str]]
    line: tuple[float, str] | None = None


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A matrix: a cell's shade is 0..1 of the ink, its text stands in the tooltip."""

    title: str
    cells: list[list[tuple[float, str]]]


@dataclass(frozen=True, kw_only=True)
class Matrices:
    """Matrices on one scale of shades from `low` to `high`."""

    name: str
    title: str
    panels: list[Panel]
    low: str
    high: str
    texts: list[str]


@dataclass(frozen=True, kw_only=True)
class Line:
    """Points "x,y ..." in 0..1000 from the upper left; `band` the outline of lowest and highest, if points are means of several."""

    label: str
    tone: str
    points: str
    band: str = ""


@dataclass(frozen=True, kw_only=True)
class Lines:
    """Lines over one axis; ticks are (percent from the left or the top, label)."""

    name: str
    title: str
    lines: list[Line]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]

    def named(self) -> list[tuple[str, str]]:
        """Tone and label of each line."""
        return [(line.tone, line.label) for line in self.lines]


@dataclass(frozen=True)
class Scale:
    """Values from `low` to `high` as percent from 0 to 100; what lies outside is drawn at the edge."""

    low: Number
    high: Number
    steps: list[Number] = field(default_factory=list)

    def __call__(self, value: Number) -> float:
        return round(100 * min(max((value - self.low) / (self.high - self.low), 0.0), 1.0), 2)

    def mark(self, tone: str, value: Number, low: Number | None = None, high: Number | None = None) -> Mark:
        low, high = value if low is None else low, value if high is None else high
        return Mark(tone=tone, value=self(value), low=self(low), high=self(high))

    def ticks(self, show: Callable[[Number], str] = "{:g}".format) -> list[tuple[float, str]]:
        return [(self(step), show(step)) for step in self.steps]


def scale_of(values: Sequence[Number], *, start: Number | None = None, count: int = 4) -> Scale:
    """A scale around the values whose about `count` ticks are round numbers; it begins at `start`, if that is given.

    Values that are all alike get a scale with room on both sides.
    """
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    low = low if start is None else min(start, low)
    if not high > low:
        room = abs(high) / 2 or 0.5
        low, high = (low if low == start else low - room), high + room
    step = _round_step((high - low) / count)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    steps = [round(number * step, 12) for number in range(first, last + 1)]
    return Scale(steps[0], steps[-1], steps)


def _round_step(least: float) -> float:
    """1, 2 or 5 times a power of ten, not below `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))


def lines(
    name: str,
    title: str,
    steps: Sequence[Number],
    curves: Mapping[str, Sequence[Number | None]],
    *,
    start: Number | None = None,
) -> Lines | None:
    """Curves over steps, the first in the student's tone; None if there is no finite point. Long ones are means of some steps each."""
    finite = {
        label: [
            (step, value)
            for step, value in zip(steps, curve, strict=True)
            if value is not None and math.isfinite(value)
        ]
        for label, curve in curves.items()
    }
    drawn = {label: _binned(points) for label, points in finite.items() if points}
    if not drawn:
        return None
    everything = [value for bins in drawn.values() for bin_ in bins for value in bin_[1:]]
    y = scale_of(everything, start=start)
    x = Scale(min(steps), max(steps)) if max(steps) > min(steps) else Scale(min(steps) - 1, max(steps))
    tones = ["student", *(TONES[1:] * len(drawn))]
    return Lines(
        name=name,
        title=title,
        lines=[_line(label, tone, bins, x, y) for (label, bins), tone in zip(drawn.items(), tones, strict=False)],
        x_ticks=_whole_ticks(x),
        y_ticks=[(round(100 - place, 2), label) for place, label in y.ticks()],
    )


def _binned(points: Sequence[tuple[Number, Number]]) -> list[tuple[Number, Number, Number, Number]]:
    """Step, mean, lowest and highest of as many neighbours as leave 240 points at most."""
    size = -(-len(points) // MOST_POINTS)
    bins = [points[start : start + size] for start in range(0, len(points), size)]
    return [
        (
            some[len(some) // 2][0],
            math.fsum(v for _, v in some) / len(some),
            min(v for _, v in some),
            max(v for _, v in some),
        )
        for some in bins
    ]


def _line(label: str, tone: str, bins: list[tuple[Number, Number, Number, Number]], x: Scale, y: Scale) -> Line:
    def path(pairs: list[tuple[Number, Number]]) -> str:
        return " ".join(f"{10 * x(step):g},{1000 - 10 * y(value):g}" for step, value in pairs)

    mean = [(step, value) for step, value, _, _ in bins]
    if len(mean) == 1:  # a run of one step: a level line is seen, a point is not
        mean = [(x.low, mean[0][1]), (x.high, mean[0][1])]
    outline = [(step, high) for step, _, _, high in bins] + [(step, low) for step, _, low, _ in reversed(bins)]
    wide = any(high > low for _, _, low, high in bins)
    return Line(label=label, tone=tone, points=path(mean), band=path(outline) if wide else "")


def _whole_ticks(x: Scale) -> list[tuple[float, str]]:
    """First and last step, and round ones between whose numbers do not run into theirs."""
    steps = [step for step in scale_of([x.low, x.high]).steps if x.low < step < x.high and step == int(step)]
    inner = [step for step in steps if 12 < x(step) < 78]
    return [(x(step), f"{step:,.0f}") for step in (x.low, *inner, x.high)]
