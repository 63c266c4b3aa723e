"""A statistic with its bootstrap interval, and the difference of two systems on the same rows with its p-value."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

CHUNK = 2**22  # values drawn at a time
EIGHT = 8  # rows whose signs are one byte


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A statistic and its bootstrap interval; prints as 0.842 [0.831, 0.853]."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        digits = 3 if not abs(self.value) >= 10 else 1
        return f"{self.value:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"

    def as_json(self) -> dict[str, float | None]:
        """Plain JSON; what is undefined, as a rank correlation of constants, is null."""
        return {name: value if math.isfinite(value) else None for name, value in vars(self).items()}


@dataclass(frozen=True, kw_only=True)
class Difference:
    """First less second with its interval, and how often chance makes a difference as large; prints as +0.012 [+0.004, +0.020], p = 0.0040."""

    interval: Interval
    p_value: float

    def __str__(self) -> str:
        one = self.interval
        return f"{one.value:+.3f} [{one.low:+.3f}, {one.high:+.3f}], p = {self.p_value:.4f}"


def mean(values: Float[Tensor, "*samples n"]) -> Float[Tensor, "*samples"]:
    """Over the last axis: the statistic of an interval if no other is given."""
    return values.mean(-1)


def bootstrap_interval(
    *values: Float[Tensor, "n"],
    statistic: Callable[..., Tensor] = mean,
    counted: Callable[..., Tensor] | None = None,
    samples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """The percentile interval of `statistic` over rows drawn with replacement; several arrays are drawn together.

    `bootstrap_interval(scores)`; `bootstrap_interval(a, b, statistic=spearman, counted=spearman_counted)`. The statistic
    reduces the last axis of (samples, n) arrays; `counted(counts, *values)`, where given, is the same of rows that stand
    counts (samples, n) times, for a statistic that has no need to see them drawn. Resamples on which it is NaN are left
    out. Same seed, same interval; no global seed is touched. O(samples * n), 4M values at a time. Efron 1979.
    """
    _check_rows("bootstrap_interval", values)
    _check_samples("bootstrap_interval", samples, confidence)
    return _interval(values, statistic, _resampled(values, statistic, counted, samples, seed), confidence)


def bootstrap_means(
    *values: Float[Tensor, "n"], samples: int = 1000, confidence: float = 0.95, seed: int = 0
) -> list[Interval]:
    """`bootstrap_interval` of the mean of each array by itself, at one draw of rows for all of them."""
    _check_rows("bootstrap_means", values)
    _check_samples("bootstrap_means", samples, confidence)
    found = _resampled(values, mean, _counted_means, samples, seed)
    return [_interval((one,), mean, means, confidence) for one, means in zip(values, found.unbind(-1), strict=True)]


def paired_difference(
    first: Float[Tensor, "n"], second: Float[Tensor, "n"], *, samples: int = 1000, flips: int = 9999, seed: int = 0
) -> Difference:
    """The mean of first - second over rows that both systems were scored on: bootstrap interval, p-value by sign flips.

    If the two systems are alike, each row's difference might as well have the other sign: p is the share of random signs
    whose sum is as far from 0, two-sided. No distribution is assumed, and no p is below 1 / (flips + 1).
    O((samples + flips / 8) * n). Fisher 1935; Smucker et al. 2007, who recommend it for retrieval.
    """
    _check_rows("paired_difference", (first, second))
    differences = (first.detach().double() - second.detach().double()).cpu()
    p_value = _sign_flip_p_value(differences, flips, seed)
    return Difference(interval=bootstrap_interval(differences, samples=samples, seed=seed), p_value=p_value)


def resampled_difference(
    *values: Float[Tensor, "n"],
    statistic: Callable[..., Tensor],
    counted: Callable[..., Tensor] | None = None,
    samples: int = 1000,
    seed: int = 0,
) -> Difference:
    """A difference that is no mean over rows, such as of two rank correlations: interval and p-value by one bootstrap.

    `resampled_difference(a, b, gold, statistic=lambda a, b, gold: spearman(a, gold) - spearman(b, gold))`: the arrays are
    drawn together, `counted` as in `bootstrap_interval`. p is twice the smaller share of resamples on either side of 0, so it is
    below .05 where the 95 % interval leaves 0 out. Swapping the systems row by row, as sign flips do, would mix two scales
    of cosines in one ranking.
    """
    _check_rows("resampled_difference", values)
    found = _resampled(values, statistic, counted, samples, seed)
    found = found[~found.isnan()]
    tails = [(int((side >= 0).sum()) + 1) / (len(found) + 1) for side in (found, -found)]
    p_value = min(1.0, 2 * min(tails)) if len(found) else math.nan
    return Difference(interval=_interval(values, statistic, found, 0.95), p_value=p_value)


def _check_rows(caller: str, values: tuple[Tensor, ...]) -> None:
    if not values or not len(values[0]) or any(v.shape != (len(values[0]),) for v in values):
        raise ValueError(f"{caller} needs arrays of one length, got {[tuple(v.shape) for v in values]}.")


def _check_samples(caller: str, samples: int, confidence: float) -> None:
    if samples < 1 or not 0 < confidence < 1:
        raise ValueError(f"{caller} needs samples >= 1 and 0 < confidence < 1, got {samples=}, {confidence=}.")


def _counted_means(counts: Float[Tensor, "samples n"], *values: Float[Tensor, "n"]) -> Float[Tensor, "samples m"]:
    """Means of rows that stand `counts` times; NaN where one that is not finite does."""
    lost = [~one.isfinite() for one in values]
    means = [counts @ one.masked_fill(odd, 0.0) / len(one) for one, odd in zip(values, lost, strict=True)]
    hit = [counts @ odd.double() > 0 for odd in lost]
    return torch.stack([one.masked_fill(odd, torch.nan) for one, odd in zip(means, hit, strict=True)], dim=-1)


def _resampled(
    values: tuple[Tensor, ...],
    statistic: Callable[..., Tensor],
    counted: Callable[..., Tensor] | None,
    samples: int,
    seed: int,
) -> Float[Tensor, "samples *m"]:
    arrays, rows = [value.detach().double().cpu() for value in values], len(values[0])
    generator = torch.Generator().manual_seed(seed)
    draws = (torch.randint(rows, (size, rows), generator=generator) for size in _chunks(samples, rows))
    if counted is not None:
        return torch.cat([counted(_counts(draw), *arrays) for draw in draws])
    return torch.cat([statistic(*(array[draw] for array in arrays)) for draw in draws])


def _counts(draw: Int[Tensor, "samples n"]) -> Float[Tensor, "samples n"]:
    """How often each row was drawn."""
    ones = torch.ones((), dtype=torch.float64).expand(draw.shape)
    return torch.zeros(draw.shape, dtype=torch.float64).scatter_add_(1, draw, ones)


def _interval(
    values: tuple[Tensor, ...], statistic: Callable[..., Tensor], resampled: Tensor, confidence: float
) -> Interval:
    tails = torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=torch.float64)
    low, high = resampled.nanquantile(tails).tolist() if len(resampled) else (math.nan, math.nan)
    return Interval(value=float(statistic(*(value.detach().double().cpu() for value in values))), low=low, high=high)


def _sign_flip_p_value(differences: Float[Tensor, "n"], flips: int, seed: int) -> float:
    """A random byte signs eight rows at a time: their sums under each of its 256 values are known before."""
    observed, sums = differences.sum().abs(), torch.zeros(flips, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    eights = rearrange(F.pad(differences, (0, -len(differences) % EIGHT)), "(g e) -> g e", e=EIGHT)
    bits = rearrange(torch.arange(2**EIGHT), "s -> s 1") >> torch.arange(EIGHT) & 1
    for signed in eights @ (1 - 2.0 * bits.double()).T:
        sums += signed[torch.randint(2**EIGHT, (flips,), generator=generator)]
    # A sum that is the observed one but for rounding is as far from 0.
    extreme = int((sums.abs() >= observed - 1e-9 * differences.abs().sum()).sum())
    return math.nan if differences.isnan().any() else (extreme + 1) / (flips + 1)


def _chunks(samples: int, rows: int) -> list[int]:
    return [len(part) for part in torch.arange(samples).split(max(1, CHUNK // rows))]
