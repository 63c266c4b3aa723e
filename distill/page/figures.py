"""The figures of a run, from its report: each is None where the report has not what it needs."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from distill.evaluation import INDEX, MIXED, START, STUDENT
from distill.page import charts, words
from distill.page.charts import Group, Lines, Matrices, Number, Panel, Row, Rows, Scale
from distill.page.words import Report, Score, Speed, known

LABELS = {
    STUDENT + INDEX: "student, teacher’s index",
    START + INDEX: "untrained start, teacher’s index",
    STUDENT + MIXED: "student, mixed index",
    STUDENT: "student, own index",
    START: "untrained start, own index",
}
ON_THEIR_OWN = {STUDENT: "student", START: "untrained start"}
TONES = {STUDENT: "student", START: "start", "teacher": "teacher"}
SHARES = ("cosine to teacher", "neighbour overlap@10", "overlap@10 in teacher's index", "similarity spearman", "CKA")
SLICED = "neighbour overlap@10"


def retention(report: Report) -> Rows | None:
    """What each system keeps of each of the teacher's scores."""
    systems = {name: words.kept(report, name) for name in LABELS}
    metrics = list(dict.fromkeys(metric for row in systems.values() for metric in row))
    indexed = any(systems[name] for name in (STUDENT + INDEX, STUDENT + MIXED))
    labels = LABELS if indexed else LABELS | ON_THEIR_OWN
    groups = [
        [(labels[name], _tone(name), row[metric]) for name, row in systems.items() if metric in row]
        for metric in metrics
    ]
    return share_bars(
        "retention", "Share of the teacher’s score, with 95 % interval", dict(zip(metrics, groups, strict=True))
    )


def share_bars(name: str, title: str, groups: Mapping[str, Sequence[tuple[str, str, Score]]]) -> Rows | None:
    """Bars of shares of the teacher's score, whose own is a line at 100 %: by metric (label, tone, share)."""
    shares = [one for rows in groups.values() for _, _, one in rows]
    if not shares:
        return None
    highest = max([1.0, *(value for one in shares for value in (one["value"], one.get("high")) if value is not None)])
    scale = Scale(0.0, min(highest, 2.0), [0.0, 0.25, 0.5, 0.75, 1.0])
    return Rows(
        name=name,
        title=title,
        kind="bar",
        groups=[
            Group(heading=metric, rows=[_row(label, tone, one, scale, words.percent) for label, tone, one in rows])
            for metric, rows in groups.items()
        ],
        ticks=scale.ticks(lambda share: f"{100 * share:.0f} %"),
        line=(scale(1.0), "teacher"),
    )


def fidelity(report: Report) -> Rows | None:
    """How near the student is to the teacher on all held-out texts, and how near it started."""
    wholes = {name: _whole(report, name)["scores"] for name in (STUDENT, START) if _whole(report, name)}
    return fidelity_dots("fidelity", "On all texts", {name: (TONES[name], row) for name, row in wholes.items()})


def fidelity_dots(
    name: str, title: str, systems: Mapping[str, tuple[str, Mapping[str, Score]]], *, said: bool = True
) -> Rows | None:
    """Dots of the numbers that are at most 1, one line a metric: by label (tone, scores); the first one's in words, if `said`."""
    rows = []
    scale = Scale(0.0, 1.0, [0.0, 0.25, 0.5, 0.75, 1.0])
    for metric in SHARES:
        found = [(tone, row[metric]) for tone, row in systems.values() if known(row.get(metric))]
        if found:
            rows.append(_dots(metric, found, scale, said=said))
    return _dot_chart(name, title, rows, scale)


def by_length(report: Report) -> Rows | None:
    return _sliced(report, "tokens", "length", "Neighbour overlap@10, by length", "{:.0f}–{:.0f} tokens")


def by_margin(report: Report) -> Rows | None:
    return _sliced(report, "margin", "margin", "Neighbour overlap@10, by the teacher’s margin", "margin {:.2f}–{:.2f}")


def _sliced(report: Report, by: str, name: str, title: str, label: str) -> Rows | None:
    slices = {one: [part for part in _slices(report, one) if part["by"] == by] for one in (STUDENT, START)}
    scale = Scale(0.0, 1.0, [0.0, 0.25, 0.5, 0.75, 1.0])
    rows = []
    for place, part in enumerate(slices[STUDENT]):
        pairs = [
            (TONES[one], parts[place]["scores"].get(SLICED)) for one, parts in slices.items() if place < len(parts)
        ]
        found = [(tone, one) for tone, one in pairs if known(one)]
        if found:
            note = f"{part['texts']:,} texts"
            rows.append(_dots(_span(label, part["low"], part["high"]), found, scale, note))
    return _dot_chart(name, title, rows, scale)


def matrices(report: Report) -> Matrices | None:
    """Student x teacher on some held-out texts, before and after; and teacher x teacher, which is what both are to become."""
    cosines = report.get("closeup", {}).get("cosines", {})
    titles = {START: "before: untrained start", STUDENT: "after: student", "teacher": "the teacher itself"}
    shown = {title: cosines[name] for name, title in titles.items() if cosines.get(name)}
    if not {STUDENT, "teacher"} <= cosines.keys() or not shown:
        return None
    finite = [v for matrix in shown.values() for row in matrix for v in row if v is not None and math.isfinite(v)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    return Matrices(
        name="matrix",
        title="Cosines of every text by the student (rows) with every text by the teacher (columns)",
        panels=[_panel(title, matrix, low, high) for title, matrix in shown.items()],
        low=words.number(low, 2),
        high=words.number(high, 2),
        texts=report["closeup"]["texts"],
    )


def loss(steps: Sequence[Mapping[str, Any]]) -> Lines | None:
    """The loss of each step, and the parts of a sum of losses."""
    names = dict.fromkeys(name for entry in steps for name in entry if name == "loss" or name.startswith("loss/"))
    curves = {name.removeprefix("loss/"): [entry.get(name) for entry in steps] for name in names}
    return charts.lines("loss", "Loss", [entry["step"] for entry in steps], curves)


def rate(steps: Sequence[Mapping[str, Any]]) -> Lines | None:
    rates = {"learning rate": [entry.get("lr") for entry in steps]}
    return charts.lines("rate", "Learning rate", [entry["step"] for entry in steps], rates, start=0.0)


def size(report: Report) -> Rows | None:
    """Parameters and texts a second, of the teacher and the student."""
    speeds = report.get("speed", {})
    if STUDENT not in speeds or "teacher" not in speeds:
        return None
    return size_bars({name: (TONES[name], speeds[name]) for name in ("teacher", STUDENT)})


def size_bars(systems: Mapping[str, tuple[str, Speed]]) -> Rows:
    """Parameters and texts a second: by label (tone, speed)."""
    groups = []
    for heading, key, show in (
        ("Parameters", "parameters", words.amount),
        ("Texts a second, one process", "texts_per_second", lambda value: f"{value:,.0f}"),
    ):
        scale = Scale(0.0, max([speed[key] for _, speed in systems.values()] + [1e-9]))
        rows = [
            Row(label=label, text=show(speed[key]), marks=[scale.mark(tone, speed[key])])
            for label, (tone, speed) in systems.items()
        ]
        groups.append(Group(heading=heading, rows=rows))
    return Rows(name="size", title="Size and speed", kind="bar", groups=groups, ticks=[])


# Parts


def _tone(system: str) -> str:
    """The same wherever a system searches."""
    return TONES[system.partition(" -> ")[0]]


def _whole(report: Report, system: str) -> Mapping[str, Any]:
    """Fidelity of a system on all texts."""
    return next((part for part in _slices(report, system) if part["by"] == "all"), {})


def _slices(report: Report, system: str) -> list[Mapping[str, Any]]:
    return report.get("fidelity", {}).get(system, [])


def _row(label: str, tone: str, one: Score, scale: Scale, show: Any) -> Row:
    low, high = (one.get("low"), one.get("high")) if known(one) else (None, None)
    return Row(label=label, text=words.interval(one, show), marks=[scale.mark(tone, one["value"] or 0.0, low, high)])


def _dots(label: str, found: Sequence[tuple[str, Score]], scale: Scale, note: str = "", said: bool = True) -> Row:
    marks = [scale.mark(tone, one["value"], one["low"], one["high"]) for tone, one in found]  # type: ignore[arg-type]
    return Row(label=label, text=words.interval(found[0][1]) if said else "", marks=marks, note=note)


def _dot_chart(name: str, title: str, rows: list[Row], scale: Scale) -> Rows | None:
    if not rows:
        return None
    return Rows(
        name=name, title=title, kind="dot", groups=[Group(heading="", rows=rows)], ticks=scale.ticks("{:.2f}".format)
    )


def _span(label: str, low: Number, high: Number) -> str:
    """A range by its ends, or one number where both read the same."""
    both = label.format(low, high)
    first, dash, second = both.partition("–")
    return f"{first} {second.partition(' ')[2]}".strip() if dash and first.split()[-1] == second.split()[0] else both


def _panel(title: str, matrix: Sequence[Sequence[Number | None]], low: Number, high: Number) -> Panel:
    def cell(value: Number | None) -> tuple[float, str]:
        if value is None or not math.isfinite(value):
            return 0.0, words.ABSENT
        return round((value - low) / max(high - low, 1e-9), 3), words.number(value, 2)

    return Panel(title=title, cells=[[cell(value) for value in row] for row in matrix])
