"""What a page says in words: numbers as people write them, and the verdict on a run in one sentence."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from distill.evaluation import INDEX, START, STUDENT

Report = Mapping[str, Any]
Score = Mapping[str, int | float | None]
Speed = Mapping[str, int | float]
ABSENT, MINUS = "–", "−"


def number(value: int | float | None, digits: int = 3) -> str:
    """Fixed digits for a share, one for what is no share, and a dash for what is no number."""
    if value is None or not math.isfinite(value):
        return ABSENT
    return f"{value + 0.0:,.{digits if abs(value) < 10 else 1}f}".replace("-", MINUS)


def percent(value: int | float | None) -> str:
    return ABSENT if value is None or not math.isfinite(value) else f"{100 * value:.1f} %"


def score(one: Score) -> str:
    """0.605 ±0.008: with half of the interval's width."""
    low, high = one.get("low"), one.get("high")
    half = (high - low) / 2 if low is not None and high is not None else None
    return number(one["value"]) if half is None else f"{number(one['value'])} ±{half:.{3 if half < 1 else 1}f}"


def interval(one: Score, show: Any = number) -> str:
    """0.605 [0.597, 0.613]."""
    if one.get("low") is None or one.get("high") is None:
        return show(one["value"])
    return f"{show(one['value'])} [{show(one['low'])}, {show(one['high'])}]".replace(" %,", ",").replace(" %]", "]")


def signed(one: Score) -> str:
    """+0.045 [+0.031, +0.059]."""
    if one["value"] is None:
        return ABSENT
    text = f"{one['value']:+.3f}" + (f" [{one['low']:+.3f}, {one['high']:+.3f}]" if known(one) else "")
    return text.replace("-", MINUS)


def times(ratio: int | float) -> str:
    """How many times: 13.8, 353, 2,340."""
    return f"{ratio:.1f}" if ratio < 99.95 else f"{float(f'{ratio:.3g}'):,.0f}"


def amount(count: int | float) -> str:
    """109M, 7.95M, 640k."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{letter}"
    return f"{count:,.0f}"


def seconds(value: int | float) -> str:
    """48 s, 3 min 54 s, 1 h 20 min."""
    minutes, rest = divmod(round(value), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def known(one: Score | None) -> bool:
    """Whether a score has a number and an interval."""
    return one is not None and all(one.get(name) is not None for name in ("value", "low", "high"))


def short_name(model: str) -> str:
    """The last part of a folder or of org/name."""
    return model.rstrip("/").rsplit("/", 1)[-1] or model


def kept(report: Report, system: str) -> dict[str, Score]:
    """What a system keeps of each of the teacher's scores; reports of before intervals have the values alone."""
    plain = {metric: {"value": value} for metric, value in report.get("retention", {}).get(system, {}).items()}
    with_intervals = report.get("retention_intervals", {}).get(system, {})
    return {metric: with_intervals.get(metric, one) for metric, one in plain.items() if one["value"] is not None}


def headline(kept_scores: Mapping[str, Score]) -> dict[str, Score]:
    """Of retrieval nDCG stands for recall."""
    return {
        metric: one
        for metric, one in kept_scores.items()
        if not ("recall@" in metric and metric.replace("recall@", "ndcg@") in kept_scores)
    }


# The verdict


def verdict(report: Report) -> str:
    """What the student keeps, at what size and speed, in one sentence; what speaks against using it comes first."""
    found = _kept(report) or _fidelity(report) or "was trained, and scored on nothing"
    size = _size_and_speed(report)
    sentence = f"{found}{', ' if size else ''}{size}."
    warning = _training_failed(report)
    return f"{warning}: it {sentence}" if warning else f"This student {sentence}"


def _kept(report: Report) -> str:
    """ "keeps 94 % of the teacher's ndcg@10 (88 to 101 %) with your index unchanged"."""
    shares = _shares(report)
    if not shares:
        return ""
    ordered = sorted(shares, key=lambda share: share[1]["value"] or 0.0)
    (name, low, where), (best, high, _) = ordered[0], ordered[-1]
    if len(ordered) == 1:
        return f"keeps {_whole(low['value'])} % of the teacher’s {name}{_spread(low)}{where}"
    span = f"{_whole(low['value'])} % ({name}{where}) to {_whole(high['value'])} % ({best})"
    return f"keeps {span} of the teacher’s scores"


def _shares(report: Report) -> list[tuple[str, Score, str]]:
    """Each task once: with the teacher's index, where it was searched, else with the student's own vectors."""
    alone, index = (headline(kept(report, system)) for system in (STUDENT, STUDENT + INDEX))
    unchanged = [(metric, one, " with your index unchanged") for metric, one in index.items()]
    return unchanged + [(metric, one, "") for metric, one in alone.items() if metric not in index]


def _fidelity(report: Report) -> str:
    row = report.get("scores", {}).get(STUDENT, {})
    overlap = row.get("neighbour overlap@10")
    if overlap and overlap["value"] is not None:
        return f"shares {_whole(overlap['value'])} % of the teacher’s ten nearest neighbours{_spread(overlap)}"
    cosine = row.get("cosine to teacher")
    return f"has a cosine of {number(cosine['value'])} to the teacher" if cosine and cosine["value"] is not None else ""


def _size_and_speed(report: Report) -> str:
    """ "with 13.8 times fewer parameters and 2,340 times the speed"."""
    ratios = size_and_speed(report.get("speed", {}), STUDENT)
    if ratios is None:
        return ""
    smaller, faster = ratios
    size = f"{times(smaller)} times fewer parameters" if smaller >= 1.05 else "no fewer parameters"
    speed = f"{times(faster)} times the speed" if faster >= 1.05 else "no more speed"
    return f"with {size} and {speed}"


def size_and_speed(speeds: Mapping[str, Speed], student: str) -> tuple[float, float] | None:
    """How many times fewer parameters than the teacher, and how many times its texts a second."""
    teacher, mine = speeds.get("teacher"), speeds.get(student)
    if not teacher or not mine:
        return None
    smaller = teacher["parameters"] / max(mine["parameters"], 1)
    return smaller, mine["texts_per_second"] / max(teacher["texts_per_second"], 1e-9)


def _training_failed(report: Report) -> str:
    """Worse in a score that counts: one kept of the teacher, else its neighbours; or no better in any that was compared."""
    gains = {metric: gain for metric, gain in report.get("gains", {}).items() if known(gain)}
    counted = [metric for metric in headline(kept(report, STUDENT)) if metric in gains]
    counted = counted or [metric for metric in ("neighbour overlap@10", "cosine to teacher") if metric in gains][:1]
    worse = [metric for metric in counted if gains[metric]["high"] < 0]
    if worse:
        return f"Training made this student worse than its {START} in {joined(worse)}"
    if gains and not any(gain["low"] > 0 for gain in gains.values()):
        return f"Training this student gained nothing that stands out from chance over its {START}"
    return ""


def _spread(one: Score) -> str:
    return f" ({_whole(one['low'])} to {_whole(one['high'])} %)" if known(one) else ""


def _whole(share: int | float | None) -> str:
    return ABSENT if share is None else f"{100 * share:.0f}"


def joined(names: Sequence[str]) -> str:
    """one, two and three."""
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))
