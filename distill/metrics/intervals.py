"""A statistic with its bootstrap interval."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A statistic and its bootstrap interval; prints as 0.842 [0.831, 0.853]."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def mean(values: Float[Tensor, "*samples n"]) -> Float[Tensor, "*samples"]:
    return values.mean(-1)


def bootstrap_interval(
    *values: Float[Tensor, "n"],
    statistic: Callable[..., Tensor] = mean,
    samples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """The percentile interval of `statistic` over rows drawn with replacement; several arrays are drawn together.

    `bootstrap_interval(scores)`; `bootstrap_interval(a, b, statistic=spearman)`. The statistic reduces the last axis of
    (samples, n) arrays. Resamples on which it is NaN are left out. Same seed, same interval; no global seed is touched.
    O(samples * n), 4M values at a time. Efron 1979.
    """
    rows = len(values[0]) if values else 0
    if not rows or any(v.shape != (rows,) for v in values):
        raise ValueError(f"bootstrap_interval needs arrays of one length, got {[tuple(v.shape) for v in values]}.")
    if samples < 1 or not 0 < confidence < 1:
        raise ValueError(
            f"bootstrap_interval needs samples >= 1 and 0 < confidence < 1, got {samples=}, {confidence=}."
        )
    arrays = [v.detach().double().cpu() for v in values]
    generator = torch.Generator().manual_seed(seed)
    sizes = [len(part) for part in torch.arange(samples).split(max(1, 2**22 // rows))]
    draws = (torch.randint(rows, (size, rows), generator=generator) for size in sizes)
    resampled = torch.cat([statistic(*(array[draw] for array in arrays)) for draw in draws])
    tails = torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=torch.float64)
    low, high = resampled.nanquantile(tails).tolist()
    return Interval(value=float(statistic(*arrays)), low=low, high=high)
