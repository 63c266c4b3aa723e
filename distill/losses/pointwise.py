"""Each student embedding against its twin, the teacher's embedding of the same text."""

from typing import ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from distill.similarity import check_pairs, check_widths
from distill.streaming import twins


def cosine_distance(student: Float[Tensor, "b d"], teacher: Float[Tensor, "b d"]) -> Float[Tensor, ""]:
    """How far each student row points away from its teacher row.

    Equals mean(1 - cos(s_i, t_i)); a zero row counts 1. Widths must be equal. O(b * d).
    """
    _check_twins("cosine_distance", student, teacher)
    return twins.cosine_distance(student, teacher)


def embedding_mse(student: Float[Tensor, "b d"], teacher: Float[Tensor, "b d"]) -> Float[Tensor, ""]:
    """The squared distance between unit rows.

    Equals mean over rows of the *sum* over the width of (s_i - t_i)^2, which is 2 - 2 cos(s_i, t_i). A mean over the
    width too would shrink the gradient d-fold. Widths must be equal. O(b * d). Reimers and Gurevych 2020.
    """
    _check_twins("embedding_mse", student, teacher)
    return twins.squared_distance(student, teacher)


def _check_twins(caller: str, student: Tensor, teacher: Tensor) -> None:
    check_pairs(caller, student, teacher)
    check_widths(caller, student, teacher)


class CosineDistance(nn.Module):
    """`cosine_distance` as a Module."""

    uses_bank: ClassVar[bool] = False
    runs_on_shares: ClassVar[bool] = True

    def forward(self, student: Float[Tensor, "b d"], teacher: Float[Tensor, "b d"]) -> Float[Tensor, ""]:
        return cosine_distance(student, teacher)


class EmbeddingMSE(nn.Module):
    """`embedding_mse` as a Module."""

    uses_bank: ClassVar[bool] = False
    runs_on_shares: ClassVar[bool] = True

    def forward(self, student: Float[Tensor, "b d"], teacher: Float[Tensor, "b d"]) -> Float[Tensor, ""]:
        return embedding_mse(student, teacher)
