"""Two vector spaces over the same rows: their neighbourhoods, and how many directions they fill."""

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from distill.similarity import check_pairs, top_k_neighbours


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
