"""Numbers that say how good a model is: exact over uneven batches and processes, with intervals."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from distill.heads import class_logits
from distill.similarity import check_pairs, top_k_neighbours

Ranked = Int[Tensor, "q k"] | Sequence[Sequence[Hashable]]
Relevance = Sequence[Mapping[Any, float]]


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


def spearman(a: Float[Tensor, "*samples n"], b: Float[Tensor, "*samples n"]) -> Float[Tensor, "*samples"]:
    """Spearman's rank correlation over the last axis, ties at their mean rank, in float64.

    Equals scipy.stats.spearmanr; NaN where it is undefined: constant or NaN values, fewer than two. O(n log n).
    """
    if a.shape != b.shape:
        raise ValueError(f"spearman pairs values one by one, got {tuple(a.shape)} and {tuple(b.shape)}.")
    x, y = (ranks - ranks.mean(-1, keepdim=True) for ranks in (_mean_ranks(a), _mean_ranks(b)))
    return (x * y).sum(-1) / (x.square().sum(-1) * y.square().sum(-1)).sqrt()


def _mean_ranks(values: Float[Tensor, "*samples n"]) -> Float[Tensor, "*samples n"]:
    ordered = values.sort(-1).values
    below = torch.searchsorted(ordered, values.contiguous())
    up_to = torch.searchsorted(ordered, values.contiguous(), right=True)
    return ((below + up_to).double() / 2).masked_fill(values.isnan(), torch.nan)


@dataclass(frozen=True, kw_only=True)
class QueryScores:
    """One score a query, for `bootstrap_interval` or `.mean()`; `skipped` queries had nothing relevant to find."""

    values: Float[Tensor, "q"]
    skipped: int

    def mean(self) -> float:
        return float(self.values.mean())


def recall_at_k(ranked: Ranked, qrels: Relevance, k: int) -> QueryScores:
    """The fraction of a query's relevant documents among its first k, as trec_eval's recall_k.

    `ranked` holds each query's documents, best first (the indices of `top_k_neighbours`); `qrels` a query's
    {document: grade}, relevant above 0.
    """
    return _score_queries(ranked, qrels, k, lambda found, best: len([g for g in found if g > 0]) / len(best))


def ndcg_at_k(ranked: Ranked, qrels: Relevance, k: int) -> QueryScores:
    """The discounted gain of the first k documents over that of the best possible order, as trec_eval's ndcg_cut_k.

    Gain is the grade itself, discount log2(rank + 1). Arguments as for `recall_at_k`. Järvelin and Kekäläinen 2002.
    """
    return _score_queries(ranked, qrels, k, lambda found, best: _gain(found) / _gain(best[:k]))


def _score_queries(
    ranked: Ranked, qrels: Relevance, k: int, score: Callable[[list[float], list[float]], float]
) -> QueryScores:
    """`score(grades of the first k documents, grades of all relevant ones from the highest)` of every query."""
    rows = ranked.tolist() if isinstance(ranked, Tensor) else ranked
    if len(rows) != len(qrels) or k < 1:
        raise ValueError(f"Ranks need one qrels mapping a query and k >= 1, got {len(rows)}, {len(qrels)} and {k=}.")
    values = []
    for row, (documents, grades) in enumerate(zip(rows, qrels, strict=True)):
        if len(set(documents[:k])) < len(documents[:k]):
            raise ValueError(f"Query {row} ranks a document twice among its first {k}: it would count twice.")
        if best := sorted((grade for grade in grades.values() if grade > 0), reverse=True):
            values.append(score([max(0.0, grades.get(document, 0.0)) for document in documents[:k]], best))
    return QueryScores(values=torch.tensor(values, dtype=torch.float64), skipped=len(rows) - len(values))


def _gain(grades: Sequence[float]) -> float:
    discounts = torch.arange(2, len(grades) + 2, dtype=torch.float64).log2()
    return float((torch.tensor(grades, dtype=torch.float64) / discounts).sum())


def neighbour_overlap(
    a_vectors: Float[Tensor, "n d"], b_vectors: Float[Tensor, "n e"], k: int = 10
) -> Float[Tensor, "n"]:
    """The fraction of each row's k nearest other rows that two spaces share: 1 is the same neighbourhood.

    Equals len(set(a) & set(b)) / k. Two unlike spaces share k / (n - 1) by chance. 2n^2(d + e) FLOP.
    """
    check_pairs("neighbour_overlap", a_vectors, b_vectors)
    (_, a), (_, b) = (top_k_neighbours(rows, rows, k, exclude_self=True) for rows in (a_vectors, b_vectors))
    return (rearrange(a, "n k -> n k 1") == rearrange(b, "n k -> n 1 k")).any(-1).float().mean(-1)


def effective_rank(vectors: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """How many directions the rows fill: exp of the entropy of their singular values, in float64; 0 if all are zero.

    Equals exp(-sum p log p) with p = s / sum(s). O(n d^2) for n > d. Roy and Vetterli 2007; Garrido et al. 2023 (RankMe).
    """
    singular = torch.linalg.svdvals(vectors.double())
    total = singular.sum()
    shares = singular / torch.where(total > 0, total, 1)
    return torch.where(total > 0, torch.special.entr(shares).sum().exp(), 0.0)


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
