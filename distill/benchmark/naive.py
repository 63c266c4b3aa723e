"""The losses as a few lines of torch, and their gradient in float64.

A naive loss takes some rows of the batch and gives their part of the mean. With all rows it is what people write; with a
few at a time, in float64, it is the reference, whose matrix need not fit.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

ALL = slice(None)
# Rows of which the reference has the gradient, where a row's can be had alone: half are the first, half the last.
SAMPLE = 64
# Entries that a piece of the reference may have, and all of its pieces together.
PIECE, LIMIT = 2**24, 2**30


class Batch(NamedTuple):
    """Rows as they come in, and the temperature for losses that have one. Columns: the teacher's rows, then the bank's."""

    student: Float[Tensor, "b d"]
    columns: Float[Tensor, "n d"]
    temperature: float

    @property
    def teacher(self) -> Float[Tensor, "b d"]:
        return self.columns[: len(self.student)]

    @property
    def bank(self) -> Float[Tensor, "m d"] | None:
        return self.columns[len(self.student) :] if len(self.columns) > len(self.student) else None


def unit(rows: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
    return F.normalize(rows, dim=-1)


def _wide(x: Tensor) -> Tensor:
    """As autocast does before a softmax."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def twins(batch: Batch) -> Int[Tensor, " b"]:
    return torch.arange(len(batch.student), device=batch.student.device)


# Naive losses


def cross_contrastive(batch: Batch, rows: slice) -> Float[Tensor, ""]:
    return _contrastive(batch.student[rows], batch.columns, batch, rows)


def symmetric(batch: Batch, rows: slice) -> Float[Tensor, ""]:
    other_way = _contrastive(batch.teacher[rows], batch.student, batch, rows)
    return (cross_contrastive(batch, rows) + other_way) / 2


def _contrastive(queries: Tensor, columns: Tensor, batch: Batch, rows: slice) -> Float[Tensor, ""]:
    logits = unit(queries) @ unit(columns).T / batch.temperature
    return F.cross_entropy(_wide(logits), twins(batch)[rows], reduction="sum") / len(batch.student)


def cross_kl(batch: Batch, rows: slice) -> Float[Tensor, ""]:
    columns = unit(batch.columns)
    return _kl(unit(batch.student[rows]) @ columns.T, unit(batch.teacher[rows]) @ columns.T, batch, rows)


def gram_kl(batch: Batch, rows: slice) -> Float[Tensor, ""]:
    s, t = unit(batch.student), unit(batch.teacher)
    return _kl(s[rows] @ s.T, t[rows] @ t.T, batch, rows)


def _kl(student: Tensor, teacher: Tensor, batch: Batch, rows: slice) -> Float[Tensor, ""]:
    """The twins are left out by a logit whose exp is 0."""
    logs = []
    for cosines in (student, teacher):
        logits = _wide(cosines / batch.temperature)
        logits.diagonal(rows.start or 0).fill_(-1e9)
        logs.append(logits.log_softmax(-1))
    return F.kl_div(logs[0], logs[1], log_target=True, reduction="sum") / len(batch.student)


def cross_mse(batch: Batch, rows: slice) -> Float[Tensor, ""]:
    columns = unit(batch.columns)
    difference = unit(batch.student[rows]) @ columns.T - unit(batch.teacher[rows]) @ columns.T
    return _wide(difference).square().sum() / (len(batch.student) * len(columns))


def gram_mse(batch: Batch, rows: slice) -> Float[Tensor, ""]:
    s, t = unit(batch.student), unit(batch.teacher)
    return _wide(s[rows] @ s.T - t[rows] @ t.T).square().sum() / len(s) ** 2


def _gram_mse_of_rows(batch: Batch, rows: slice) -> Float[Tensor, ""]:
    """Has the gradient of gram_mse for these rows, no other: each stands on both sides of a symmetric matrix."""
    s, t = unit(batch.student.detach()), unit(batch.teacher)
    return 2 * (unit(batch.student[rows]) @ s.T - t[rows] @ t.T).square().sum() / len(s) ** 2


def similarity_preserving(batch: Batch, rows: slice) -> Float[Tensor, ""]:
    s, t = unit(batch.student), unit(batch.teacher)
    return _wide(unit(s[rows] @ s.T) - unit(t[rows] @ t.T)).square().sum() / len(s) ** 2


def cka(batch: Batch, rows: slice) -> Float[Tensor, ""]:
    """Of all rows. Its (d, d) form, which is the cheaper one where rows are more than the width."""
    s, t = (_wide(x) - _wide(x).mean(0) for x in (unit(batch.student), unit(batch.teacher)))
    return 1 - (t.T @ s).square().sum() / ((s.T @ s).norm() * (t.T @ t).norm())


def rkd_distance(batch: Batch, rows: slice) -> Float[Tensor, ""]:
    """Of all rows: the mean distance is theirs."""
    s, t = (_distances(unit(x)) for x in (batch.student, batch.teacher))
    return F.smooth_l1_loss(s / s[s > 0].mean(), t / t[t > 0].mean())


def _distances(x: Float[Tensor, "b d"]) -> Float[Tensor, "b b"]:
    squares = _wide(x.square().sum(-1))
    product = rearrange(squares, "b -> b 1") + squares - 2 * _wide(x @ x.T)
    own = torch.eye(len(x), dtype=torch.bool, device=x.device)
    return product.clamp(min=1e-12).sqrt().masked_fill(own, 0.0)


def rkd_angle(batch: Batch, rows: slice) -> Float[Tensor, ""]:
    """The rows are anchors."""
    s, t = (_angles(unit(x), rows) for x in (batch.student, batch.teacher))
    return F.smooth_l1_loss(s, t, reduction="sum") / len(batch.student) ** 3


def _angles(x: Float[Tensor, "b d"], anchors: slice) -> Float[Tensor, "k b b"]:
    directions = unit(rearrange(x, "b d -> 1 b d") - rearrange(x[anchors], "k d -> k 1 d"))
    return _wide(directions @ rearrange(directions, "k b d -> k d b"))


def rank_hinge(batch: Batch, rows: slice) -> Float[Tensor, ""]:
    """The rows are pairs of rows. Without ties, which random numbers do not have."""
    count = len(batch.student)
    i, j = torch.triu_indices(count, count, 1, device=batch.student.device)
    s, t = (_wide(x @ x.T)[i, j] for x in (unit(batch.student), unit(batch.teacher)))
    hinges = F.relu(0.015 - (rearrange(s[rows], "p -> p 1") - s))
    return hinges.masked_fill(rearrange(t[rows], "p -> p 1") <= t, 0.0).sum() / (len(s) * (len(s) - 1) / 2)


NAIVE: dict[str, Callable[[Batch, slice], Float[Tensor, ""]]] = {
    "cross_contrastive": cross_contrastive,
    "symmetric": symmetric,
    "cross_kl": cross_kl,
    "cross_mse": cross_mse,
    "gram_mse": gram_mse,
    "gram_kl": gram_kl,
    "similarity_preserving": similarity_preserving,
    "cka": cka,
    "rkd_distance": rkd_distance,
    "rkd_angle": rkd_angle,
    "rank_hinge": rank_hinge,
}
# Losses whose gradient of a row can be had alone.
ROW_BY_ROW = ("cross_contrastive", "cross_kl", "cross_mse", "gram_mse")
WITH_BANK = ("cross_contrastive", "symmetric", "cross_kl", "cross_mse")
WITH_TEMPERATURE = ("cross_contrastive", "symmetric", "cross_kl", "gram_kl")


def entries(loss: str, rows: int, columns: int, width: int) -> int:
    """Of the largest tensor that the naive loss makes."""
    each, count = _pieces(loss, rows, columns, width)
    return each * count


def _pieces(loss: str, rows: int, columns: int, width: int) -> tuple[int, int]:
    """Entries of that tensor for one of the naive loss's `rows`, and how many of these there are."""
    if loss == "rank_hinge":
        return rows * (rows - 1) // 2, rows * (rows - 1) // 2
    if loss == "rkd_angle":
        return rows * max(rows, width), rows
    return width if loss == "cka" else columns, rows


# The reference


def exact_gradient(loss: str, batch: Batch) -> tuple[Int[Tensor, " r"], Float[Tensor, "r d"]] | None:
    """Numbers of rows and their gradient, by autograd in float64 of the naive loss; None where that takes too long.

    Of all rows, or of a sample where a row's gradient can be had alone.
    """
    student = batch.student.detach().double().requires_grad_()
    exact = Batch(student, batch.columns.double(), batch.temperature)
    count = len(student)
    if loss in ROW_BY_ROW:
        half = min(SAMPLE // 2, count // 2)
        parts = [slice(0, half), slice(count - half, count)] if count > SAMPLE else [slice(0, count)]
    elif entries(loss, count, len(batch.columns), student.shape[1]) > LIMIT:
        return None
    else:
        parts = list(_sweep(loss, batch))
    function = _gram_mse_of_rows if loss == "gram_mse" else NAIVE[loss]
    for rows in parts:
        function(exact, rows).backward()
    assert student.grad is not None
    numbers = torch.arange(count, device=student.device)
    if loss in ROW_BY_ROW:
        numbers = torch.cat([numbers[rows] for rows in parts])
    return numbers, student.grad[numbers]


def _sweep(loss: str, batch: Batch) -> Iterator[slice]:
    each, count = _pieces(loss, len(batch.student), len(batch.columns), batch.student.shape[1])
    height = count if loss in ("cka", "rkd_distance") else max(1, PIECE // each)
    return (slice(start, min(start + height, count)) for start in range(0, count, height))


def relative_error(gradient: Float[Tensor, "b d"], exact: tuple[Tensor, Tensor]) -> float:
    """The largest error of an entry over the largest entry."""
    rows, expected = exact
    return float((gradient[rows].double() - expected).abs().max() / expected.abs().max())
