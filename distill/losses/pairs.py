"""Distances, angles and the order of pairs of rows: what a student can keep of its teacher in a space of another width."""

import math
from numbers import Integral
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from distill.similarity import check_pairs
from distill.streaming import order, pairs

# rkd_angle's work grows with anchors * rows^2. More rows than these take turns.
MOST_ANCHORS = 2048


def rkd_distance(student: Float[Tensor, "b d"], teacher: Float[Tensor, "b e"]) -> Float[Tensor, ""]:
    """How well the distances between rows match the teacher's, up to scale.

    Equals `F.smooth_l1_loss(d / d[d > 0].mean(), e / e[e > 0].mean())`, where d and e are the (b, b) distances of the
    student's and of the teacher's unit rows. The gradient includes that of the mean. Equal rows have distance 0 and no
    gradient between them; a zero row lies at the origin. Widths may differ.
    Four products of (b, b, d or e) with the gradient; O(b (d + e)) memory and at most 128 MB. Park et al. 2019 (RKD-D).
    """
    check_pairs("rkd_distance", student, teacher)
    return pairs.rkd_distance(student, teacher)


def rkd_angle(
    student: Float[Tensor, "b d"], teacher: Float[Tensor, "b e"], *, anchors: int | None = None
) -> Float[Tensor, ""]:
    """How well the angles of all triangles of rows match the teacher's.

    Equals the mean over anchors k and all b * b pairs (i, j) of smooth_l1(u_ik . u_jk, v_ik . v_jk), where u_ik is the
    direction from student row k to row i, F.normalize(s_i - s_k), zero between equal rows, and v the teacher's.
    `anchors` of the rows, evenly spaced in the batch, are anchors: None takes all up to 2,048. Widths may differ.
    O(anchors * b^2) FLOP and O(b^2) memory: neither grows with the width. Park et al. 2019 (RKD-A).
    """
    _check_anchors("rkd_angle", anchors)
    check_pairs("rkd_angle", student, teacher)
    return pairs.rkd_angle(student, teacher, anchors or MOST_ANCHORS)


def rank_hinge(
    student: Float[Tensor, "b d"], teacher: Float[Tensor, "b e"], *, margin: float = 0.015
) -> Float[Tensor, ""]:
    """Every two pairs of rows in the teacher's order: its closer pair is the student's closer one, by a margin of cosine.

    Equals the mean of max(0, margin - (s_p - s_q)) over all p, q with t_p > t_q, where p and q are pairs of rows i < j
    and s, t their cosines with the student and the teacher. Ties of the teacher, as copies of a text make them, order
    nothing; without any order the loss is 0. Widths may differ.
    O(p log p) for p = b (b - 1) / 2 pairs, where the naive form compares p with p; O(b^2) memory, float64 cosines.
    Zhang et al. 2024 (Jasper and Stella).
    """
    _check_margin("rank_hinge", margin)
    check_pairs("rank_hinge", student, teacher)
    return order.rank_hinge(student, teacher, margin)


def _check_anchors(caller: str, anchors: int | None) -> None:
    if anchors is not None and not isinstance(anchors, Integral):
        raise TypeError(f"{caller} takes anchors as a whole number of rows, got {anchors!r}.")
    if anchors is not None and anchors < 1:
        raise ValueError(
            f"{caller} takes at least one row as anchor, got anchors={anchors}. None takes all up to 2,048."
        )


def _check_margin(caller: str, margin: float) -> None:
    if not 0 <= margin < math.inf:
        raise ValueError(f"{caller} takes a margin of cosine, 0 or more, got {margin}. Try 0.015.")


class RKDDistance(nn.Module):
    """`rkd_distance` as a Module."""

    uses_bank: ClassVar[bool] = False
    runs_on_shares: ClassVar[bool] = True

    def forward(self, student: Float[Tensor, "b d"], teacher: Float[Tensor, "b e"]) -> Float[Tensor, ""]:
        return rkd_distance(student, teacher)


class RKDAngle(nn.Module):
    """`rkd_angle` as a Module, which keeps its number of anchors."""

    uses_bank: ClassVar[bool] = False
    runs_on_shares: ClassVar[bool] = True

    def __init__(self, *, anchors: int | None = None) -> None:
        super().__init__()
        _check_anchors("RKDAngle", anchors)
        self.anchors = anchors

    def forward(self, student: Float[Tensor, "b d"], teacher: Float[Tensor, "b e"]) -> Float[Tensor, ""]:
        return rkd_angle(student, teacher, anchors=self.anchors)

    def extra_repr(self) -> str:
        return f"anchors={self.anchors}"


class RankHinge(nn.Module):
    """`rank_hinge` as a Module, which keeps its margin."""

    uses_bank: ClassVar[bool] = False
    runs_on_shares: ClassVar[bool] = True

    def __init__(self, *, margin: float = 0.015) -> None:
        super().__init__()
        _check_margin("RankHinge", margin)
        self.margin = margin

    def forward(self, student: Float[Tensor, "b d"], teacher: Float[Tensor, "b e"]) -> Float[Tensor, ""]:
        return rank_hinge(student, teacher, margin=self.margin)

    def extra_repr(self) -> str:
        return f"margin={self.margin}"
