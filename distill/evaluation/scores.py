"""Scores of several systems, each with its interval: tables for people, plain JSON for machines."""

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float
from torch import Tensor

from distill.evaluation.closeup import Closeup
from distill.metrics import (
    Difference,
    Interval,
    bootstrap_interval,
    bootstrap_means,
    paired_difference,
    resampled_difference,
    spearman,
    spearman_counted,
)

STUDENT, START = "student", "untrained start"  # what a training run scores
INDEX, MIXED = " -> teacher's index", " -> mixed index"  # behind the name of a system whose queries search there


@dataclass(frozen=True)
class Score:
    """A number with its interval, and what it comes from, kept for paired comparison.

    `values` are the rows it is the mean of; `ranked` the two lists whose rank correlation it is.
    """

    interval: Interval
    values: Float[Tensor, " n"] | None = None
    ranked: tuple[Float[Tensor, " n"], Float[Tensor, " n"]] | None = None

    def __str__(self) -> str:
        return str(self.interval)


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Fidelity on some of the texts: those whose tokens (`by` = "tokens") or margin lie in low..high, or all (`by` = "all").

    `teacher` are the teacher's own numbers on these texts, to be read beside the student's of the same name.
    """

    by: str
    low: float
    high: float
    texts: int
    scores: dict[str, Score]
    teacher: dict[str, Score] = field(default_factory=dict)

    def __str__(self) -> str:
        bounds = (f"{bound:.0f}" if self.by == "tokens" else f"{bound:.2f}" for bound in (self.low, self.high))
        return self.by if self.by == "all" else f"{self.by} {'-'.join(bounds)}"

    def as_json(self) -> dict[str, Any]:
        bounds = {} if self.by == "all" else {"low": self.low, "high": self.high}
        scores = {"scores": _plain(self.scores), "teacher": _plain(self.teacher)}
        return {"by": self.by, **bounds, "texts": self.texts, **scores}

    def columns(self) -> dict[str, Score]:
        """The student's numbers, then the teacher's, by the names they have side by side."""
        return self.scores | {f"{metric} of teacher": score for metric, score in self.teacher.items()}


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A system's scores with vectors that are stored in fewer bytes.

    `form` is the precision; " raw" behind it: compared as whole numbers, without their ranges. `bytes` are those of a vector.
    """

    system: str
    form: str
    bytes: int
    scores: dict[str, Score]


@dataclass(frozen=True)
class Scores:
    """Scores of several systems on the same data: `table[system][metric]`; fidelity in full: `slices[student]`, all texts first.

    `closeups[student]` are some of the texts themselves; they are not in `as_json`, which goes into the exported folder.
    `stored` are those with vectors in fewer bytes, the float32 ones of a system first. `sources` are where the labelled
    tasks come from, `seen_in_training` how many of their texts are among the training texts.
    """

    table: dict[str, dict[str, Score]]
    speeds: dict[str, dict[str, int | float]]
    slices: dict[str, list[Slice]] = field(default_factory=dict)
    closeups: dict[str, Closeup] = field(default_factory=dict)
    stored: list[Stored] = field(default_factory=list)
    sources: dict[str, str] = field(default_factory=dict)
    seen_in_training: dict[str, int] = field(default_factory=dict)

    def compare(self, first: str, second: str, metric: str) -> Difference:
        """What `first` scores more than `second` on the same rows, with its paired interval and p-value.

        Means over rows by sign flips (`metrics.paired_difference`), rank correlations by resampling (`metrics.resampled_difference`).
        """
        one, two = self.of(first)[metric], self.of(second)[metric]
        if one.values is not None and two.values is not None:
            return paired_difference(one.values, two.values)
        if one.ranked is None or two.ranked is None:
            raise ValueError(f"{metric} is no mean over rows, nor a rank correlation; there is no paired difference.")
        return resampled_difference(*one.ranked, *two.ranked, statistic=_rank_difference, counted=_counted_difference)

    def differences(self, first: str, second: str) -> dict[str, Difference]:
        """`compare` on every metric that both were scored on, row by row."""
        one, two = self.of(first), self.of(second)
        both = [metric for metric in one if metric in two and _by_rows(one[metric]) and _by_rows(two[metric])]
        return {metric: self.compare(first, second, metric) for metric in both}

    def share(self, system: str, of: str, metric: str) -> Interval:
        """What `system` keeps of another's score on the same rows: the ratio of the two, with its paired bootstrap interval."""
        mine, whole = self.of(system)[metric], self.of(of)[metric]
        if mine.values is not None and whole.values is not None:
            return bootstrap_interval(mine.values, whole.values, statistic=_mean_share, counted=_counted_mean_share)
        if mine.ranked is not None and whole.ranked is not None:
            return bootstrap_interval(*mine.ranked, *whole.ranked, statistic=_rank_share, counted=_counted_rank_share)
        value = mine.interval.value / whole.interval.value if whole.interval.value else math.nan
        return Interval(value=value, low=math.nan, high=math.nan)

    def kept(self, system: str) -> dict[str, Interval]:
        """The share of each of the teacher's scores that a system keeps, as far as the teacher's is above 0."""
        teacher, row = self.table["teacher"], self.table.get(system, {})
        common = [metric for metric, score in teacher.items() if metric in row and score.interval.value > 0]
        found = {metric: self.share(system, "teacher", metric) for metric in common}
        return {metric: share for metric, share in found.items() if math.isfinite(share.value)}

    def of(self, system: str) -> dict[str, Score]:
        """All scores of a system on all of the data: its row of the table, and its fidelity in full."""
        fidelity = {name: score for part in self.slices.get(system, [])[:1] for name, score in part.scores.items()}
        return self.table.get(system, {}) | fidelity

    def as_json(self) -> dict[str, Any]:
        """Plain JSON; a number that is undefined, as a rank correlation of constants, is null."""
        slices = {name: [part.as_json() for part in parts] for name, parts in self.slices.items()}
        return {
            "scores": {name: _plain(row) for name, row in self.table.items()},
            "speed": self.speeds,
            **({"scored_on": self.sources} if self.sources else {}),
            **({"seen_in_training": self.seen_in_training} if self.seen_in_training else {}),
            **({"fidelity": slices} if slices else {}),
            **({"precisions": self._stored()} if self.stored else {}),
        }

    def kept_of_float32(self, stored: Stored) -> dict[str, float]:
        """The share of each score with float32 vectors that the same system keeps with these."""
        whole = next(one for one in self.stored if one.system == stored.system).scores
        shares = {
            name: score.interval.value / (whole[name].interval.value or math.nan)
            for name, score in stored.scores.items()
        }
        return {name: share for name, share in shares.items() if math.isfinite(share)}

    def stored_table(self) -> str:
        """Systems and precisions down, metrics across, each value with half the width of its 95 % interval and the share kept."""
        metrics = list(dict.fromkeys(metric for one in self.stored for metric in one.scores))
        lines = _headed(["", "vectors", "bytes", *("\n".join(textwrap.wrap(metric, 20)) for metric in metrics)])
        for one in self.stored:
            kept = self.kept_of_float32(one)
            cells = [
                _cell(one.scores.get(metric)) + (f" {kept[metric]:.1%}" if metric in kept else "") for metric in metrics
            ]
            lines.append([one.system if one.form == "float32" else "", one.form, f"{one.bytes:,}", *cells])
        return _aligned(lines)

    def _stored(self) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        for one in self.stored:
            plain = {"bytes": one.bytes, "scores": _plain(one.scores), "kept": self.kept_of_float32(one)}
            found.setdefault(one.system, {})[one.form] = plain
        return found

    def __str__(self) -> str:
        """A table: metrics down, systems across, each value with half the width of its 95 % interval; then size and speed."""
        systems = list(self.table)
        metrics = list(dict.fromkeys(metric for row in self.table.values() for metric in row))
        lines = _headed(["", *map(_heading, systems)])
        lines += [[metric, *(_cell(row.get(metric)) for row in self.table.values())] for metric in metrics]
        for metric, show in _SPEED_CELLS.items():
            if self.speeds:
                lines.append([metric, *(show(self.speeds[name]) if name in self.speeds else "" for name in systems)])
        return _aligned(lines)


def slice_table(slices: Sequence[Slice]) -> str:
    """Fidelity in full: slices down, metrics across, each value with half the width of its 95 % interval."""
    metrics = list(dict.fromkeys(metric for part in slices for metric in part.columns()))
    lines = _headed(["", "texts", *("\n".join(textwrap.wrap(metric, 12)) for metric in metrics)])
    for part in slices:
        lines.append([str(part), f"{part.texts:,}", *(_cell(part.columns().get(metric)) for metric in metrics)])
    return _aligned(lines)


def differences_json(differences: Mapping[str, Difference]) -> dict[str, dict[str, float | None]]:
    """Plain JSON of `Scores.differences`."""
    return {name: one.interval.as_json() | _finite({"p_value": one.p_value}) for name, one in differences.items()}


def retention_json(scores: Scores) -> dict[str, Any]:
    """Plain JSON of `Scores.kept` of every system: the shares, and the same with their intervals."""
    kept = {system: scores.kept(system) for system in scores.table if system != "teacher"}
    return {
        "retention": {system: {metric: one.value for metric, one in row.items()} for system, row in kept.items()},
        "retention_intervals": {
            system: {metric: one.as_json() for metric, one in row.items()} for system, row in kept.items()
        },
    }


def mean_score(values: Float[Tensor, " n"]) -> Score:
    return mean_scores({"": values})[""]


def mean_scores(values: Mapping[str, Float[Tensor, " n"]]) -> dict[str, Score]:
    """The mean of each of several numbers of the same rows."""
    exact = {name: some.double() for name, some in values.items()}
    intervals = bootstrap_means(*exact.values()) if exact else []
    return {name: Score(one, exact[name]) for name, one in zip(exact, intervals, strict=True)}


def rank_score(values: Float[Tensor, " n"], reference: Float[Tensor, " n"]) -> Score:
    """Spearman's correlation of two lists."""
    ranked = values.double(), reference.double()
    return Score(bootstrap_interval(*ranked, statistic=spearman, counted=spearman_counted), ranked=ranked)


_SPEED_CELLS: dict[str, Callable[[dict[str, int | float]], str]] = {
    "parameters": lambda speed: f"{speed['parameters'] / 1e6:,.3g}M",
    "texts/s, one process": lambda speed: f"{speed['texts_per_second']:,.0f}",
}


def _rank_difference(first: Tensor, first_reference: Tensor, second: Tensor, second_reference: Tensor) -> Tensor:
    return spearman(first, first_reference) - spearman(second, second_reference)


def _mean_share(first: Tensor, second: Tensor) -> Tensor:
    return first.mean(-1) / second.mean(-1)


def _rank_share(first: Tensor, first_reference: Tensor, second: Tensor, second_reference: Tensor) -> Tensor:
    return spearman(first, first_reference) / spearman(second, second_reference)


def _counted_difference(
    counts: Tensor, first: Tensor, first_reference: Tensor, second: Tensor, second_reference: Tensor
) -> Tensor:
    return spearman_counted(counts, first, first_reference) - spearman_counted(counts, second, second_reference)


def _counted_mean_share(counts: Tensor, first: Tensor, second: Tensor) -> Tensor:
    return counts @ first / (counts @ second)


def _counted_rank_share(
    counts: Tensor, first: Tensor, first_reference: Tensor, second: Tensor, second_reference: Tensor
) -> Tensor:
    return spearman_counted(counts, first, first_reference) / spearman_counted(counts, second, second_reference)


def _by_rows(score: Score) -> bool:
    return score.values is not None or score.ranked is not None


def _heading(system: str) -> str:
    name, _, index = system.partition(" -> ")
    return "\n".join([name, *textwrap.wrap(f"-> {index}", 15)]) if index else name


def _headed(names: Sequence[str]) -> list[list[str]]:
    """Headings of several lines as lines of cells."""
    parts = [name.split("\n") for name in names]
    return [[part[line] if line < len(part) else "" for part in parts] for line in range(max(map(len, parts)))]


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    cells = ([cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines)
    return "\n".join("  ".join(line).rstrip() for line in cells)


def _cell(score: Score | None) -> str:
    if score is None:
        return ""
    digits = 3 if not abs(score.interval.value) >= 2 else 1  # a rank is no share of 1
    return f"{score.interval.value:.{digits}f} ±{(score.interval.high - score.interval.low) / 2:.{digits}f}"


def _plain(scores: Mapping[str, Score]) -> dict[str, dict[str, float | None]]:
    return {metric: score.interval.as_json() for metric, score in scores.items()}


def _finite(values: dict[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in values.items()}
