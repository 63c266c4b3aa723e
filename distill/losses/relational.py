"""The student x student matrix against the teacher x teacher matrix: widths may differ."""

from typing import ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from distill.losses.cross import check_temperatures
from distill.similarity import check_pairs
from distill.streaming import divergence, moments


def gram_mse(student: Float[Tensor, "b d"], teacher: Float[Tensor, "b e"]) -> Float[Tensor, ""]:
    """How well the cosines among the student's rows match the cosines among the teacher's.

    Equals the mean over all b * b pairs (i, j), the diagonal included, of (s_i . s_j - t_i . t_j)^2. Widths may differ.
    From moments of the width, 8.7 b d^2 FLOP with the gradient where both are d wide and O((d + e)^2) memory; below some
    1.7 d rows from the (b, b) matrix. In float32 exact to 1e-5, next to the teacher too. On CUDA in float64.
    """
    check_pairs("gram_mse", student, teacher)
    return moments.gram_mse(student, teacher)


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
    of one counts 0. Not multiplied by temperature^2. Widths may differ; where they do, or the student is the teacher turned,
    the gradient is off by 5e-6 at a KL of 3e-2 and 5e-5 at 3e-4, since float32 rounds the cosines themselves.
    Two products of (b, b, d) and one of (b, b, e) with the gradient, at most twice that; O(b (d + e)) memory and two
    chunks of rows of the matrix: 256 MB together, 512 MB at 262,144 rows and above. Park et al. 2019; Fang et al. 2021 (SEED).
    """
    check_temperatures("gram_kl", temperature, teacher_temperature)
    check_pairs("gram_kl", student, teacher)
    return divergence.gram_kl(student, teacher, temperature, teacher_temperature or temperature)


def similarity_preserving(student: Float[Tensor, "b d"], teacher: Float[Tensor, "b e"]) -> Float[Tensor, ""]:
    """How well each row's cosines to all rows point where the teacher's do, however long that list of cosines is.

    Equals |normalize(S S^T) - normalize(T T^T)|^2 / b^2 of unit rows S and T, normalised again by row: twice the mean over
    rows of 1 - cosine of the two lists, divided by b. Widths may differ. From moments in float64, 19 b d^2 FLOP with the
    gradient where both are d wide and O((d + e)^2) memory; below some 3 d rows from the (b, b) matrices. Tung and Mori 2019.
    """
    check_pairs("similarity_preserving", student, teacher)
    return moments.similarity_preserving(student, teacher)


def cka(student: Float[Tensor, "b d"], teacher: Float[Tensor, "b e"]) -> Float[Tensor, ""]:
    """One minus linear CKA: how far the two sets of rows are from one another turned, mirrored or scaled.

    Equals 1 - |X^T Y|^2 / (|X^T X| |Y^T Y|) of unit rows X and Y, each less its mean. Counts 0 where one side's rows are
    all alike, hence for a batch of one. Widths may differ. From moments in float64, 8.7 b d^2 FLOP with the gradient where
    both are d wide, O((d + e)^2) memory; below some 1.7 d rows from the (b, b) matrices. Kornblith et al. 2019.
    """
    check_pairs("cka", student, teacher)
    return moments.cka(student, teacher)


class GramMSE(nn.Module):
    """`gram_mse` as a Module."""

    uses_bank: ClassVar[bool] = False
    runs_on_shares: ClassVar[bool] = True

    def forward(self, student: Float[Tensor, "b d"], teacher: Float[Tensor, "b e"]) -> Float[Tensor, ""]:
        return gram_mse(student, teacher)


class GramKL(nn.Module):
    """`gram_kl` as a Module, which keeps its temperatures."""

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


class SimilarityPreserving(nn.Module):
    """`similarity_preserving` as a Module."""

    uses_bank: ClassVar[bool] = False
    runs_on_shares: ClassVar[bool] = True

    def forward(self, student: Float[Tensor, "b d"], teacher: Float[Tensor, "b e"]) -> Float[Tensor, ""]:
        return similarity_preserving(student, teacher)


class CKA(nn.Module):
    """`cka` as a Module."""

    uses_bank: ClassVar[bool] = False
    runs_on_shares: ClassVar[bool] = True

    def forward(self, student: Float[Tensor, "b d"], teacher: Float[Tensor, "b e"]) -> Float[Tensor, ""]:
        return cka(student, teacher)
