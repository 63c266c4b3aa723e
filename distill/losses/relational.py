"""The student x student matrix against the teacher x teacher matrix: widths may differ."""

from typing import ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from distill.losses.cross import check_temperatures
from distill.similarity import check_pairs, cosine_similarity_matrix, normalize
from distill.streaming import divergence


def gram_mse(student: Float[Tensor, "b d"], teacher: Float[Tensor, "b e"]) -> Float[Tensor, ""]:
    """How well the cosines among the student's rows match the cosines among the teacher's.

    Equals the mean over all b * b pairs (i, j), the diagonal included, of (s_i . s_j - t_i . t_j)^2. Widths may differ.
    Two (b, b) matrices, O(b^2 (d + e)) FLOP.
    """
    check_pairs("gram_mse", student, teacher)
    return (_gram(student) - _gram(teacher.detach())).square().mean()


def gram_kl(
    student: Float[Tensor, "b d"],
    teacher: Float[Tensor, "b e"],
    *,
    temperature: float = 0.05,
    teacher_temperature: float | None = None,
) -> Float[Tensor, ""]:
    """KL from the teacher's to the student's distribution over the other rows of the batch.

    Equals the mean over i of KL(softmax(t_i / teacher_temperature) || softmax(s_i / temperature)), where t_i and s_i are
    the cosines of row i to every *other* row: kept, the diagonal would hold .9999 of a row at temperature .02. A batch
    of one counts 0. Not multiplied by temperature^2. Widths may differ.
    Two products of (b, b, d) and one of (b, b, e) with the gradient, at most twice that; O(b (d + e)) memory and two
    chunks of rows of the matrix, 256 MB together. Park et al. 2019; Fang et al. 2021 (SEED).
    """
    check_temperatures("gram_kl", temperature, teacher_temperature)
    check_pairs("gram_kl", student, teacher)
    return divergence.gram_kl(student, teacher, temperature, teacher_temperature or temperature)


def _gram(rows: Float[Tensor, "b d"]) -> Float[Tensor, "b b"]:
    unit = normalize(rows)  # once: the gradients of both uses then meet in float32, not in the dtype of the rows
    return cosine_similarity_matrix(unit, unit)


class GramMSE(nn.Module):
    uses_bank: ClassVar[bool] = False

    def forward(self, student: Float[Tensor, "b d"], teacher: Float[Tensor, "b e"]) -> Float[Tensor, ""]:
        return gram_mse(student, teacher)


class GramKL(nn.Module):
    uses_bank: ClassVar[bool] = False
    runs_on_shares: ClassVar[bool] = True

    def __init__(self, *, temperature: float = 0.05, teacher_temperature: float | None = None) -> None:
        super().__init__()
        check_temperatures("GramKL", temperature, teacher_temperature)
        self.temperature, self.teacher_temperature = temperature, teacher_temperature

    def forward(self, student: Float[Tensor, "b d"], teacher: Float[Tensor, "b e"]) -> Float[Tensor, ""]:
        return gram_kl(student, teacher, temperature=self.temperature, teacher_temperature=self.teacher_temperature)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, teacher_temperature={self.teacher_temperature}"
