"""Scores of several systems, each with its interval: a table for people, plain JSON for machines."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from distill.metrics import Interval, bootstrap_interval


@dataclass(frozen=True)
class Score:
    """A number with its interval; `values` are the rows it is the mean of, kept for paired comparison."""

    interval: Interval
    values: Float[Tensor, " n"] | None = None

    def __str__(self) -> str:
        return str(self.interval)


@dataclass(frozen=True)
class Scores:
    """Scores of several systems on the same data: `table[system][metric]`."""

    table: dict[str, dict[str, Score]]
    speeds: dict[str, dict[str, int | float]]

    def difference(self, first: str, second: str, metric: str) -> Interval:
        """The mean of first - second over the rows that both were scored on, with its paired interval."""
        one, two = self.table[first][metric].values, self.table[second][metric].values
        if one is None or two is None:
            raise ValueError(f"{metric} is no mean over rows; there is no paired difference.")
        return bootstrap_interval(one - two)

    def as_json(self) -> dict[str, Any]:
        """Plain JSON; a number that is undefined, as a rank correlation of constants, is null."""
        scores = {
            name: {metric: _finite(asdict(score.interval)) for metric, score in row.items()}
            for name, row in self.table.items()
        }
        return {"scores": scores, "speed": self.speeds}

    def __str__(self) -> str:
        """A table: metrics down, systems across, each value with half the width of its 95 % interval; then size and speed."""
        systems = list(self.table)
        metrics = list(dict.fromkeys(metric for row in self.table.values() for metric in row))
        heads = [name.partition(" -> ") for name in systems]
        lines = [["", *(name for name, _, _ in heads)]]
        lines += [["", *(f"-> {index}" if index else "" for _, _, index in heads)]] if any(h[2] for h in heads) else []
        lines += [[metric, *(_cell(row.get(metric)) for row in self.table.values())] for metric in metrics]
        for metric, show in _SPEED_CELLS.items():
            if self.speeds:
                lines.append([metric, *(show(self.speeds[name]) if name in self.speeds else "" for name in systems)])
        widths = [max(len(line[column]) for line in lines) for column in range(len(systems) + 1)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
        )


def mean_score(values: Float[Tensor, " n"]) -> Score:
    values = values.double()
    return Score(bootstrap_interval(values), values)


_SPEED_CELLS: dict[str, Callable[[dict[str, int | float]], str]] = {
    "parameters": lambda speed: f"{speed['parameters'] / 1e6:,.3g}M",
    "texts/s, one process": lambda speed: f"{speed['texts_per_second']:,.0f}",
}


def _cell(score: Score | None) -> str:
    if score is None:
        return ""
    return f"{score.interval.value:.3f} ±{(score.interval.high - score.interval.low) / 2:.3f}"


def _finite(values: dict[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in values.items()}
