"""Rank correlation, and what stands among the first k."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

Ranked = Int[Tensor, "q k"] | Sequence[Sequence[Hashable] | Int[Tensor, " k"]]
Relevance = Sequence[Mapping[Any, float]]


def spearman(a: Float[Tensor, "*samples n"], b: Float[Tensor, "*samples n"]) -> Float[Tensor, "*samples"]:
    """Spearman's rank correlation over the last axis, ties at their mean rank, in float64.

    Equals scipy.stats.spearmanr; NaN where it is undefined: constant or NaN values, fewer than two. O(n log n).
    """
    if a.shape != b.shape:
        raise ValueError(f"spearman pairs values one by one, got {tuple(a.shape)} and {tuple(b.shape)}.")
    x, y = (ranks - ranks.mean(-1, keepdim=True) for ranks in (_mean_ranks(a), _mean_ranks(b)))
    return (x * y).sum(-1) / (x.square().sum(-1) * y.square().sum(-1)).sqrt()


def spearman_counted(
    counts: Float[Tensor, "*samples n"], a: Float[Tensor, " n"], b: Float[Tensor, " n"]
) -> Float[Tensor, "*samples"]:
    """`spearman` of rows that stand `counts` times each, as in a bootstrap: only a and b are sorted, once. O(n) a sample.

    Equals spearman(a[drawn], b[drawn]) where `drawn` names row i counts[i] times, but for rounding.
    """
    lost = a.isnan() | b.isnan()
    x, y = (_counted_ranks(counts, values).masked_fill_(lost, 0.0) for values in (a, b))
    weighted = counts * x
    product, own = (weighted * y).sum(-1), weighted.mul_(x).sum(-1)
    found = product / (own * torch.mul(counts, y, out=weighted).mul_(y).sum(-1)).sqrt()
    return found.masked_fill((counts * lost).sum(-1) > 0, torch.nan)


def _counted_ranks(counts: Float[Tensor, "*samples n"], values: Float[Tensor, " n"]) -> Float[Tensor, "*samples n"]:
    """Mean ranks of rows that stand `counts` times, less the mean of all."""
    levels, place = values.unique(return_inverse=True)  # sorted; of all NaN each is a level of its own, the last ones
    of_level = torch.zeros(*counts.shape[:-1], len(levels), dtype=torch.float64).index_add_(-1, place, counts.double())
    up_to = of_level.cumsum(-1)
    return (up_to - of_level / 2 - up_to[..., -1:] / 2)[..., place]


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
    rows = [row.tolist() if isinstance(row, Tensor) else row for row in ranked]  # a tensor is no key of qrels
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
