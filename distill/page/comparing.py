"""Several runs, or several models, on one page: scores with intervals, what each keeps, size and speed."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distill.evaluation import INDEX, STUDENT
from distill.page import figures, words
from distill.page.charts import TONES
from distill.page.rendering import rendered
from distill.page.words import Report, Score, Speed, known


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One system of a report: `system` is its name there, `label` the one it has on the page."""

    label: str
    report: Report
    system: str = STUDENT

    def row(self, behind: str = "") -> Mapping[str, Score]:
        return self.report.get("scores", {}).get(self.system + behind, {})

    def kept(self, behind: str = "") -> dict[str, Score]:
        return words.kept(self.report, self.system + behind)

    def speed(self) -> Speed | None:
        return self.report.get("speed", {}).get(self.system)


def comparison(
    entries: Sequence[Entry],
    *,
    title: str,
    differences: Mapping[str, Any] | None = None,
    gates: Sequence[Mapping[str, Any]] = (),
) -> str:
    """HTML of several entries; `differences` of the first to the others, in pairs, and `gates` are as evaluate.py reports them."""
    tones = [TONES[number % len(TONES)] for number in range(len(entries))]
    toned = list(zip(entries, tones, strict=True))
    metrics = {
        behind: list(dict.fromkeys(metric for one in entries for metric in one.row(behind))) for behind in ("", INDEX)
    }
    columns = [(metric, behind) for behind, names in metrics.items() for metric in names]
    return rendered(
        "compare.html",
        title=title,
        lead=_lead(entries),
        unlike=_unlike(entries),
        entries=[(tone, one.label, _about(one)) for one, tone in toned],
        columns=[f"{metric}, teacher’s index" if behind else metric for metric, behind in columns],
        teacher=[words.score(one) if (one := _teacher(entries, metric)) else "" for metric, _ in columns],
        table=[(tone, one.label, [_cell(one, *column, entries) for column in columns]) for one, tone in toned],
        retention=figures.share_bars("retention", "Share of the teacher’s score", _shares(toned)),
        fidelity=figures.fidelity_dots(
            "fidelity", "", {one.label: (tone, _whole(one)) for one, tone in toned}, said=False
        ),
        size=figures.size_bars(_speeds(toned)) if _speeds(toned) else None,
        differences=[
            (name, [_difference(*pair) for pair in found.items()]) for name, found in (differences or {}).items()
        ],
        first=entries[0].label,
        gates=gates,
        whose=[(tone, one.label) for one, tone in toned],
    )


def labels(names: Sequence[str]) -> list[str]:
    """The names without what they all begin with, folder by folder."""
    parts = [name.rstrip("/").split("/") for name in names]
    while len({tuple(some[:1]) for some in parts}) == 1 and all(len(some) > 1 for some in parts):
        parts = [some[1:] for some in parts]
    return ["/".join(some) for some in parts]


def _lead(entries: Sequence[Entry]) -> str:
    """Which one is best by the first score that all have, and whose intervals overlap its own."""
    for verb, what, scores in _in_common(entries):
        order = sorted(range(len(entries)), key=lambda number: -(scores[number]["value"] or 0.0))
        best, *others = ((entries[number].label, scores[number]) for number in order)
        most = "the most, " if others else ""
        sentence = (
            f"{best[0]} {verb} {most}{words.percent(best[1]['value'])}{',' if most else ''} of the teacher’s {what}"
        )
        level = [label for label, score in others if _overlap(score, best[1])]
        return f"{sentence}{f'; its interval overlaps that of {words.joined(level)}' if level else ''}."
    return "No score is common to all of them."


def _in_common(entries: Sequence[Entry]) -> Iterator[tuple[str, str, list[Score]]]:
    """What all have of the teacher's scores with its index, then alone, then of its neighbours: verb, what of, shares."""
    for behind, where in ((INDEX, " with the teacher’s index"), ("", "")):
        kept = [words.headline(one.kept(behind)) for one in entries]
        for metric in kept[0]:
            if all(metric in row for row in kept):
                yield "keeps", f"{metric}{where}", [row[metric] for row in kept]
    rows = [one.row().get("neighbour overlap@10") for one in entries]
    if all(row and row["value"] is not None for row in rows):
        yield "shares", "ten nearest neighbours", [row for row in rows if row]


def _overlap(one: Score, other: Score) -> bool:
    return known(one) and known(other) and one["high"] >= other["low"] and other["high"] >= one["low"]  # type: ignore[operator]


def _unlike(entries: Sequence[Entry]) -> list[str]:
    """Why they may not be compared: the teacher's own scores differ, or those of its vectors on the held-out texts."""
    first = entries[0].report
    reasons = []
    for one in entries[1:]:
        other = one.report
        if first.get("teacher_fingerprint") != other.get("teacher_fingerprint"):
            reasons.append(
                f"{one.label} has another teacher than {entries[0].label}, or the teacher reads texts otherwise."
            )
        elif _by_teacher(entries[0]) != _by_teacher(one):
            reasons.append(f"{one.label} was scored on other data than {entries[0].label}.")
    return reasons


def _by_teacher(entry: Entry) -> Any:
    """What the teacher itself has on the data: equal where the data are."""
    parts = entry.report.get("fidelity", {}).get(entry.system, [])[:1]
    held_out = [(part["texts"], part.get("teacher")) for part in parts]
    return entry.report.get("scores", {}).get("teacher", {}), held_out


def _teacher(entries: Sequence[Entry], metric: str) -> Score | None:
    return next(
        (row[metric] for one in entries if metric in (row := one.report.get("scores", {}).get("teacher", {}))), None
    )


def _cell(entry: Entry, metric: str, behind: str, entries: Sequence[Entry]) -> tuple[str, bool]:
    """The score as text, and whether it is the highest of the column."""
    mine = entry.row(behind).get(metric)
    if mine is None:
        return "", False
    others = [one.row(behind)[metric]["value"] for one in entries if metric in one.row(behind)]
    highest = max((value for value in others if value is not None), default=None)
    return words.score(mine), len(others) > 1 and mine["value"] == highest


def _shares(toned: Sequence[tuple[Entry, str]]) -> dict[str, list[tuple[str, str, Score]]]:
    groups: dict[str, list[tuple[str, str, Score]]] = {}
    for behind, where in ((INDEX, ", teacher’s index"), ("", "")):
        for one, tone in toned:
            for metric, share in one.kept(behind).items():
                groups.setdefault(f"{metric}{where}", []).append((one.label, tone, share))
    return groups


def _whole(entry: Entry) -> Mapping[str, Score]:
    """Fidelity on all texts."""
    parts = entry.report.get("fidelity", {}).get(entry.system, [])
    return parts[0]["scores"] if parts else {}


def _speeds(toned: Sequence[tuple[Entry, str]]) -> dict[str, tuple[str, Speed]]:
    """The teacher's, then each one's."""
    measured = {one.label: (tone, speed) for one, tone in toned if (speed := one.speed())}
    teacher = next((speed for one, _ in toned if (speed := one.report.get("speed", {}).get("teacher"))), None)
    return ({"the teacher": ("teacher", teacher)} if teacher and measured else {}) | measured


def _about(entry: Entry) -> str:
    """Student, loss and training time, as far as they are known."""
    report, training = entry.report, entry.report.get("training", {})
    student = report.get("student", {}).get("name", "")
    time = f"{training['steps']:,} steps, {words.seconds(training['seconds'])}" if training else ""
    return " · ".join(part for part in (student, report.get("loss", ""), time) if part)


def _difference(metric: str, one: Mapping[str, Any]) -> tuple[str, str, str]:
    p_value = "" if one.get("p_value") is None else f"{one['p_value']:.4f}"
    return metric, words.signed(one) if known(one) else words.ABSENT, p_value
