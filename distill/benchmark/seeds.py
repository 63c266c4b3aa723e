"""Scores of several seeds as one table."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from distill.evaluation import Score, Scores
from distill.metrics import Interval


@dataclass(frozen=True)
class Averaged:
    """The mean over seeds of a score and of the bounds of its interval, and the score of each seed.

    The interval says how sure the number is of other texts; the spread of the seeds how sure it is of another run.
    """

    interval: Interval
    seeds: tuple[float, ...]

    @classmethod
    def of(cls, scores: Sequence[Score]) -> "Averaged":
        value, low, high = (fmean(getattr(one.interval, name) for one in scores) for name in ("value", "low", "high"))
        return cls(Interval(value=value, low=low, high=high), tuple(one.interval.value for one in scores))

    def __str__(self) -> str:
        half = (self.interval.high - self.interval.low) / 2
        spread = f", seeds {min(self.seeds):.3f} to {max(self.seeds):.3f}" if len(set(self.seeds)) > 1 else ""
        return f"{self.interval.value:.3f} ±{half:.3f}{spread}"


def average(scores: Sequence[Scores]) -> dict[str, dict[str, Averaged]]:
    """table[system][metric] over seeds; a system that some seeds lack is averaged over those that have it."""
    systems = dict.fromkeys(system for one in scores for system in one.table)
    return {
        system: {
            metric: Averaged.of([one.table[system][metric] for one in scores if system in one.table])
            for metric in next(one.table[system] for one in scores if system in one.table)
        }
        for system in systems
    }
