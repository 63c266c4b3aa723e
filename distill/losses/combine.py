"""Sums of losses whose weights may follow the run's progress, and one loss at several widths."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from numbers import Integral

from jaxtyping import Float, Int
from torch import Tensor, nn

from distill.similarity import check_bank, check_pairs

Schedule = Callable[[float], float]


def constant(weight: float) -> Schedule:
    """The same weight all along."""
    return partial(_same, weight)


def linear_decay(start: float, until: float = 0.5) -> Schedule:
    """From `start` in a straight line to 0 at progress `until`, and 0 from there on."""
    if not 0 < until <= 1:
        raise ValueError(f"linear_decay reaches 0 at a progress in (0, 1], got until={until}.")
    return partial(_falling, start, until)


def _same(weight: float, progress: float) -> float:
    return weight


def _falling(start: float, until: float, progress: float) -> float:
    return start * max(0.0, 1 - progress / until)


class WeightedSum(nn.Module):
    """The sum over terms of weight * term, each weight a number or a schedule of the run's progress in [0, 1].

    Without `weights` every term counts 1. A term whose weight is 0 at this progress is not computed. Bank and keys reach only
    terms with `uses_bank`; ValueError for a bank if there is none.
    """

    progress: float
    uses_bank: bool
    runs_on_shares: bool

    def __init__(self, terms: Mapping[str, nn.Module], weights: Mapping[str, float | Schedule] | None = None) -> None:
        super().__init__()
        if not isinstance(terms, Mapping):
            raise TypeError(
                f'WeightedSum takes losses by name, {{"twin": CosineDistance()}}, got {type(terms).__name__}.'
            )
        weights = dict.fromkeys(terms, 1.0) if weights is None else weights
        if not isinstance(weights, Mapping):
            raise TypeError(f'WeightedSum takes weights by name, {{"twin": 1.0}}, got {type(weights).__name__}.')
        if not terms or terms.keys() != weights.keys():
            raise ValueError(f"WeightedSum needs a weight for every term, got {[*terms]} and weights {[*weights]}.")
        wrong = [name for name in terms if not name or "." in name or hasattr(nn.ModuleDict, name)]
        if wrong:
            raise ValueError(
                f"WeightedSum's terms are torch modules, and torch takes no {wrong} for a name. Rename them."
            )
        self.terms = nn.ModuleDict(terms)
        self.schedules = {name: w if callable(w) else constant(w) for name, w in weights.items()}
        self.uses_bank = any(_uses_bank(term) for term in terms.values())
        self.runs_on_shares = all(_runs_on_shares(term) for term in terms.values())
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
            _set_progress(term, progress)

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
        _check_bank("WeightedSum", bank, self.uses_bank)
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
        return ", ".join(f"{name}={_told(schedule)}" for name, schedule in self.schedules.items())


def _told(schedule: Schedule) -> str:
    """A constant weight, or the weights at each quarter of a run: it says the same at any progress."""
    weights = [f"{schedule(quarter / 4):g}" for quarter in range(5)]
    return weights[0] if len(set(weights)) == 1 else ":".join(weights)


class Matryoshka(nn.Module):
    """The same loss at nested widths: a vector's first entries are to be a vector of their own.

    Equals the sum over widths w of weight * loss(student[:, :w], teacher[:, :w], bank[:, :w]); `weights` are in
    the order of the widths, or by width; without them every width counts 1. The loss must normalise inside, as all of
    distill's do: the cut rows then have length 1 on both sides.
    A teacher of another width than the student's stays whole, for losses that allow it (relational ones).
    Costs the loss once a width. Kusupati et al. 2022.
    """

    uses_bank: bool
    runs_on_shares: bool

    def __init__(
        self,
        loss: nn.Module,
        widths: Sequence[int],
        weights: Sequence[float] | Mapping[int, float] | None = None,
    ) -> None:
        super().__init__()
        chosen = tuple(widths) if isinstance(widths, Iterable) else (None,)
        if not all(isinstance(width, Integral) for width in chosen):
            raise TypeError(f"Matryoshka takes widths as whole numbers, such as (64, 128, 256), got {widths!r}.")
        if isinstance(weights, Mapping) and weights.keys() != set(chosen):
            raise ValueError(f"Matryoshka has widths {chosen} and weights of {[*weights]}. Give each width its weight.")
        self.loss, self.widths = loss, tuple(map(int, chosen))
        if isinstance(weights, Mapping):
            weights = [weights[width] for width in self.widths]
        self.weights = (1.0,) * len(self.widths) if weights is None else tuple(weights)
        self._check()
        self.uses_bank, self.runs_on_shares = _uses_bank(loss), _runs_on_shares(loss)
        self._parts: dict[str, Tensor] = {}

    def _check(self) -> None:
        rising = sorted(set(self.widths))
        if self.widths not in (tuple(rising), tuple(rising[::-1])) or not rising or rising[0] < 1:
            raise ValueError(
                f"Matryoshka takes widths from 1 that rise, or fall, each once; got {self.widths}. Try (64, 128, 256)."
            )
        if len(self.weights) != len(self.widths) or not all(0 < weight < math.inf for weight in self.weights):
            raise ValueError(
                f"Matryoshka needs a weight above 0 for each of its widths {self.widths}, got {self.weights}. "
                "Leave out a width that is not to count."
            )

    def set_progress(self, progress: float) -> None:
        _set_progress(self.loss, progress)

    def forward(
        self,
        student: Float[Tensor, "b d"],
        teacher: Float[Tensor, "b e"],
        bank: Float[Tensor, "n e"] | None = None,
        *,
        keys: Int[Tensor, "b"] | None = None,
        bank_keys: Int[Tensor, "n"] | None = None,
    ) -> Float[Tensor, ""]:
        check_pairs("Matryoshka", student, teacher)
        _check_bank("Matryoshka", bank, self.uses_bank)
        if bank is not None:
            check_bank("Matryoshka", teacher, bank)
        full = student.shape[-1]
        if max(self.widths) > full:
            raise ValueError(
                f"Matryoshka has widths {self.widths} and got student {tuple(student.shape)}: none can be above "
                f"{full}. Leave the larger ones out, or widen the student."
            )
        values = []
        for width in self.widths:
            cut = width if teacher.shape[-1] == full else teacher.shape[-1]
            columns = {"bank": None if bank is None else bank[:, :cut], "keys": keys, "bank_keys": bank_keys}
            values.append(self.loss(student[:, :width], teacher[:, :cut], **(columns if self.uses_bank else {})))
        self._parts = {str(width): value.detach() for width, value in zip(self.widths, values, strict=True)}
        return sum(weight * value for weight, value in zip(self.weights, values, strict=True))

    def parts(self) -> dict[str, Tensor]:
        """The unweighted value at each width of the last forward, by its width, on its device."""
        return dict(self._parts)

    def extra_repr(self) -> str:
        return f"widths={self.widths}, weights={self.weights}"


def _check_bank(caller: str, bank: Tensor | None, used: bool) -> None:
    if bank is not None and not used:
        raise ValueError(
            f"{caller} got a bank, and none of its losses has `uses_bank`. Give the Module of a loss that takes one: "
            "CrossKL(), not cross_kl."
        )


def _uses_bank(loss: nn.Module) -> bool:
    return bool(getattr(loss, "uses_bank", False))


def _runs_on_shares(loss: nn.Module) -> bool:
    return bool(getattr(loss, "runs_on_shares", False))


def _set_progress(loss: nn.Module, progress: float) -> None:
    setter = getattr(loss, "set_progress", None)
    if setter is not None:
        setter(progress)
