"""Two vector spaces over the same rows: their neighbourhoods, their shape, and how many directions they fill.

Linear CKA and effective rank are no means over rows. Their `_rows` forms are: row i is the statistic plus the influence of
row i on it, the derivative by that row's weight (the infinitesimal jackknife, Jaeckel 1972). Intervals and paired tests of
means then hold for them to first order, at one pass. Drawing the rows themselves with replacement would not do: a row
drawn twice is its own neighbour and fills no new direction, so that a CKA rises and a rank falls in every resample.
"""

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from distill.similarity import check_pairs, check_widths, normalize, top_k_neighbours

# Mean squared distance of unit rows to their mean, below which they are one row (as in losses.cka).
NO_VARIATION = 1e-12


def neighbour_overlap(
    a_vectors: Float[Tensor, "n d"], b_vectors: Float[Tensor, "n e"], k: int = 10
) -> Float[Tensor, "n"]:
    """The fraction of each row's k nearest other rows that two spaces share: 1 is the same neighbourhood.

    Equals len(set(a) & set(b)) / k. Two unlike spaces share k / (n - 1) by chance. 2n^2(d + e) FLOP.
    """
    check_pairs("neighbour_overlap", a_vectors, b_vectors)
    (_, a), (_, b) = (top_k_neighbours(rows, rows, k, exclude_self=True) for rows in (a_vectors, b_vectors))
    return shared(a, b)


def index_overlap(student: Float[Tensor, "n d"], teacher: Float[Tensor, "n d"], k: int = 10) -> Float[Tensor, "n"]:
    """What queries by the student find in an index of the teacher's vectors: the share of what the teacher's find there.

    Equals len(set(a) & set(b)) / k, where b are the k teacher rows nearest to teacher row i and a those nearest to student
    row i, teacher row i itself left out of both. `neighbour_overlap` may be 1 where this is 0: after a rotation. 4n^2 d FLOP.
    """
    check_pairs("index_overlap", student, teacher)
    check_widths("index_overlap", student, teacher)
    (_, a), (_, b) = (top_k_neighbours(rows, teacher, k, exclude_self=True) for rows in (student, teacher))
    return shared(a, b)


def neighbour_margin(vectors: Float[Tensor, "n d"], k: int = 10) -> Float[Tensor, "n"]:
    """The cosine of each row's nearest other row less that of its k-th: near 0 in a crowd, whose order is hard to keep."""
    scores, _ = top_k_neighbours(vectors, vectors, k, exclude_self=True)
    return scores[:, 0] - scores[:, -1]


def shared(a: Int[Tensor, "n k"], b: Int[Tensor, "n k"]) -> Float[Tensor, "n"]:
    """The share of each row of a that stands in the same row of b: of indices, as `top_k_neighbours` gives them."""
    return (rearrange(a, "n k -> n k 1") == rearrange(b, "n k -> n 1 k")).any(-1).float().mean(-1)


def linear_cka(a: Float[Tensor, "n d"], b: Float[Tensor, "n e"]) -> Float[Tensor, ""]:
    """How alike two spaces are, but for rotation, reflection and scale: 1 is the same shape.

    Equals |X^T Y|^2 / (|X^T X| |Y^T Y|) of unit rows X and Y, each less its mean; NaN where one side's rows are all alike.
    With few rows for their widths it lies above that of more rows. O(n (d + e) min(n, d + e)), in float64. Kornblith et al. 2019.
    """
    return linear_cka_rows(a, b).mean()


def linear_cka_rows(a: Float[Tensor, "n d"], b: Float[Tensor, "n e"]) -> Float[Tensor, "n"]:
    """Values whose mean is `linear_cka`, and whose spread is its: for intervals and paired tests (see the module's text)."""
    check_pairs("linear_cka", a, b)
    x, y = (_centred(rows) for rows in (a, b))
    across, own, other = _square_forms(x, y)
    product, scale = across.mean(), (own.mean() * other.mean()).sqrt()
    rows = (product + 2 * across) / scale - product / scale * (own / own.mean() + other / other.mean())
    varied = all(side.square().sum(1).mean() > NO_VARIATION for side in (x, y))
    return rows if varied else torch.full_like(rows, torch.nan)


def effective_rank(vectors: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """How many directions the rows fill: exp of the entropy of their singular values, in float64; 0 if all are zero.

    Equals exp(-sum p log p) with p = s / sum(s). O(n d^2) for n > d. Roy and Vetterli 2007; Garrido et al. 2023 (RankMe).
    """
    singular = torch.linalg.svdvals(vectors.double())
    total = singular.sum()
    shares = singular / torch.where(total > 0, total, 1)
    return torch.where(total > 0, torch.special.entr(shares).sum().exp(), 0.0)


def effective_rank_rows(vectors: Float[Tensor, "n d"]) -> Float[Tensor, "n"]:
    """Values whose mean is `effective_rank`, and whose spread is its: for intervals and paired tests (see the module's text).

    That of few rows lies below that of more rows: compare ranks of the same texts. Cost: an eigen-decomposition of width min(n, d).
    """
    squares, loads = _spectrum(vectors.double())
    singular = squares.sqrt()
    total = singular.sum()
    if not total > 0:
        return torch.zeros(len(vectors), dtype=torch.float64, device=vectors.device)
    shares = singular / total
    entropy = torch.special.entr(shares).sum()
    slopes = -(shares.log() + entropy) / (2 * singular * total)
    influence = (len(vectors) * loads - squares) @ slopes.masked_fill(squares == 0, 0.0)
    return entropy.exp() * (1 + influence)


def _centred(vectors: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    rows = normalize(vectors.double())
    return rows - rows.mean(0)


def _square_forms(
    x: Float[Tensor, "n d"], y: Float[Tensor, "n e"]
) -> tuple[Float[Tensor, "n"], Float[Tensor, "n"], Float[Tensor, "n"]]:
    """Rows whose means are |X^T Y|^2, |X^T X|^2 and |Y^T Y|^2 over n^2: from the (n, n) products of rows where n is small."""
    if len(x) < x.shape[1] + y.shape[1]:
        k, m = x @ x.T, y @ y.T
        return (k * m).mean(1), (k * k).mean(1), (m * m).mean(1)
    pairs = ((x, y), (x, x), (y, y))
    across, own, other = ((left @ (left.T @ right / len(x)) * right).sum(1) for left, right in pairs)
    return across, own, other


def _spectrum(rows: Float[Tensor, "n d"]) -> tuple[Float[Tensor, "r"], Float[Tensor, "n r"]]:
    """Squared singular values, and what each row adds to them: row sums of squares on each principal direction.

    What rounding leaves of a direction that is not there counts as 0.
    """
    wide = rows.shape[1] > len(rows)
    squares, directions = torch.linalg.eigh(rows @ rows.T if wide else rows.T @ rows)
    least = max(rows.shape) * torch.finfo(squares.dtype).eps * squares[-1]
    squares = torch.where(squares > least, squares, 0.0)
    return squares, directions.square() * squares if wide else (rows @ directions).square()
