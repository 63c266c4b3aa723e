"""Sums of losses whose weights may follow the run's progress."""

import math
from collections.abc import Callable, Mapping

from jaxtyping import Float, Int
from torch import Tensor, nn

Schedule = Callable[[float], float]


def constant(weight: float) -> Schedule:
    return lambda progress: weight


def linear_decay(start: float, until: float = 0.5) -> Schedule:
    """From `start` in a straight line to 0 at progress `until`, and 0 from there on."""
    if not 0 < until <= 1:
        raise ValueError(f"linear_decay reaches 0 at a progress in (0, 1], got until={until}.")
    return lambda progress: start * max(0.0, 1 - progress / until)


class WeightedSum(nn.Module):
    """The sum over terms of weight * term, each weight a number or a schedule of the run's progress in [0, 1].

    Without `weights` every term counts 1. A term whose weight is 0 at this progress is not computed. Bank and keys reach only terms with `uses_bank`.
    """

    progress: float
    uses_bank: bool

    def __init__(self, terms: Mapping[str, nn.Module], weights: Mapping[str, float | Schedule] | None = None) -> None:
        super().__init__()
        weights = dict.fromkeys(terms, 1.0) if weights is None else weights
        if not terms or terms.keys() != weights.keys():
            raise ValueError(f"WeightedSum needs a weight for every term, got {[*terms]} and weights {[*weights]}.")
        self.terms = nn.ModuleDict(terms)
        self.schedules = {name: w if callable(w) else constant(w) for name, w in weights.items()}
        self.uses_bank = any(_uses_bank(term) for term in terms.values())
        self._parts: dict[str, Tensor] = {}
        for percent in range(101):  # a sum that vanishes mid-run is found before the run
            self.set_progress(percent / 100)
            self.weights()
        self.set_progress(0.0)

    def set_progress(self, progress: float) -> None:
        if not 0 <= progress <= 1:
            raise ValueError(f"WeightedSum takes the progress of a run, from 0 to 1, got {progress}.")
        self.progress = progress
        for term in self.terms.values():
            if isinstance(term, WeightedSum):
                term.set_progress(progress)

    def weights(self) -> dict[str, float]:
        """The weights at this progress."""
        values = {name: schedule(self.progress) for name, schedule in self.schedules.items()}
        if not any(values.values()) or not all(map(math.isfinite, values.values())):
            raise ValueError(
                f"WeightedSum needs finite weights, not all 0, at every progress; at {self.progress:.2f} they are "
                f"{values}. Add a term with a constant weight."
            )
        return values

    def forward(
        self,
        student: Float[Tensor, "b d"],
        teacher: Float[Tensor, "b e"],
        bank: Float[Tensor, "n e"] | None = None,
        *,
        keys: Int[Tensor, "b"] | None = None,
        bank_keys: Int[Tensor, "n"] | None = None,
    ) -> Float[Tensor, ""]:
        cross = {"bank": bank, "keys": keys, "bank_keys": bank_keys}
        weights = {name: weight for name, weight in self.weights().items() if weight}
        values = {
            name: self.terms[name](student, teacher, **(cross if _uses_bank(self.terms[name]) else {}))
            for name in weights
        }
        self._parts = {name: value.detach() for name, value in values.items()}
        return sum(weight * values[name] for name, weight in weights.items())

    def parts(self) -> dict[str, Tensor]:
        """The unweighted terms of the last forward, on its device: reading them as numbers is the caller's choice."""
        return dict(self._parts)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={weight:g}" for name, weight in self.weights().items())


def _uses_bank(term: nn.Module) -> bool:
    return bool(getattr(term, "uses_bank", False))
