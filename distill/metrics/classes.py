"""How often the right class is among the first k."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from distill.heads import class_logits


@dataclass(frozen=True, kw_only=True)
class AccuracyCounts:
    """Correct rows at each k, and all rows: integers that add up exactly over batches and processes.

    Add the counts of batches with `+`; over processes, sum `correct` and `total` (one all-reduce each).
    """

    topk: tuple[int, ...]
    correct: Int[Tensor, "k"]
    total: Int[Tensor, ""]

    def __add__(self, other: "AccuracyCounts") -> "AccuracyCounts":
        if self.topk != other.topk:
            raise ValueError(f"AccuracyCounts add up at the same k, got {self.topk} and {other.topk}.")
        return AccuracyCounts(topk=self.topk, correct=self.correct + other.correct, total=self.total + other.total)

    def fractions(self) -> dict[int, float]:
        return {k: int(correct) / int(self.total) for k, correct in zip(self.topk, self.correct, strict=True)}


def accuracy(
    logits: Float[Tensor, "b c"] | Mapping[str, Any],
    targets: Int[Tensor, "b"],
    topk: tuple[int, ...] = (1,),
    *,
    num_classes: int | None = None,
) -> dict[int, float]:
    """The fraction of rows whose target is among the k highest logits: {1: 0.71, 5: 0.93}.

    `accuracy_counts(...)` is the same before the division: add those up, since a mean of batch means is wrong when the
    last batch is short. Takes logits, or the output of a CosineLinear and refuses its unreduced proxies.
    """
    return accuracy_counts(logits, targets, topk, num_classes=num_classes).fractions()


def accuracy_counts(
    logits: Float[Tensor, "b c"] | Mapping[str, Any],
    targets: Int[Tensor, "b"],
    topk: tuple[int, ...] = (1,),
    *,
    num_classes: int | None = None,
) -> AccuracyCounts:
    """How many rows have fewer than k logits ahead of their target's.

    Of equal logits the lower class is ahead, and NaN is ahead of everything: a model that gives constants or NaN scores
    nothing by it. `num_classes`, if given, must be the number of columns.
    """
    scores = logits if isinstance(logits, Tensor) else class_logits("accuracy", logits)
    _check_classes(scores, targets, topk, num_classes)
    column = rearrange(targets, "b -> b 1")
    own = scores.gather(1, column)
    earlier = torch.arange(scores.shape[1], device=scores.device) < column
    ahead = torch.where(earlier, ~(scores < own), ~(scores <= own)).sum(-1)
    correct = torch.stack([(ahead < k).sum() for k in topk])
    return AccuracyCounts(topk=tuple(topk), correct=correct, total=torch.full_like(correct[0], len(targets)))


def _check_classes(scores: Tensor, targets: Tensor, topk: tuple[int, ...], num_classes: int | None) -> None:
    if scores.ndim != 2 or targets.shape != scores.shape[:1] or not len(targets):
        raise ValueError(
            f"accuracy needs logits (b, classes) and targets (b,), at least one row, got {tuple(scores.shape)} and "
            f"{tuple(targets.shape)}."
        )
    if num_classes not in (None, scores.shape[1]):
        raise ValueError(
            f"accuracy needs one column for each of {num_classes} classes, got logits {tuple(scores.shape)}. Columns "
            f"that are proxies go through heads.reduce_proxies first."
        )
    if not topk or not all(1 <= k <= scores.shape[1] for k in topk):
        raise ValueError(f"accuracy needs k from 1 to the number of classes, {scores.shape[1]}, got topk={topk}.")
