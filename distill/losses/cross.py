"""The student x teacher matrix: a student's row against the teacher's row, or against its own twin in it.

Columns are all teacher rows of the batch, then the rows of the bank: teacher vectors of other texts. Keys name texts:
where a row and a column carry the same key they are the same text, and the column is left out of the row.
"""

import math
from typing import ClassVar

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from distill.similarity import check_pairs, check_widths, cosine_similarity_matrix


def cross_kl(
    student: Float[Tensor, "b d"],
    teacher: Float[Tensor, "b d"],
    bank: Float[Tensor, "n d"] | None = None,
    *,
    keys: Int[Tensor, "b"] | None = None,
    bank_keys: Int[Tensor, "n"] | None = None,
    temperature: float = 0.05,
    teacher_temperature: float | None = None,
) -> Float[Tensor, ""]:
    """KL from the teacher's to the student's distribution over the teacher's vectors.

    Equals the mean over i of KL(softmax(t_i . B / teacher_temperature) || softmax(s_i . B / temperature)), summed over
    the columns B, without column i (it says only "you are you") and without columns of row i's key. A row with no
    column left counts 0. Not multiplied by temperature^2: its gradient grows as 1 / temperature.
    Widths must be equal. Two (b, b + n) matrices, 6b(b + n)d FLOP with the gradient. Hinton et al. 2015; Fang et al.
    2021 (SEED).
    """
    check_temperatures("cross_kl", temperature, teacher_temperature)
    columns = _columns("cross_kl", student, teacher, bank)
    left_out = _left_out("cross_kl", student, bank, keys, bank_keys)
    student_cosines = cosine_similarity_matrix(student, columns)
    teacher_cosines = cosine_similarity_matrix(teacher.detach(), columns)
    return softmax_kl(student_cosines / temperature, teacher_cosines / (teacher_temperature or temperature), left_out)


def cross_contrastive(
    student: Float[Tensor, "b d"],
    teacher: Float[Tensor, "b d"],
    bank: Float[Tensor, "n d"] | None = None,
    *,
    keys: Int[Tensor, "b"] | None = None,
    bank_keys: Int[Tensor, "n"] | None = None,
    temperature: float = 0.05,
    symmetric: bool = False,
) -> Float[Tensor, ""]:
    """InfoNCE: each student row finds its own teacher twin among all columns.

    Equals the mean over i of -log softmax(s_i . B / temperature)[i]. Columns of row i's key are no negatives; column i
    always is the positive. `symmetric` averages with the other direction: each teacher row of the batch finds its
    student among all student rows (bank rows ask nothing). Not multiplied by temperature^2.
    Widths must be equal. One (b, b + n) matrix, 4b(b + n)d FLOP with the gradient. van den Oord et al. 2018.
    """
    check_temperatures("cross_contrastive", temperature)
    columns = _columns("cross_contrastive", student, teacher, bank)
    left_out = _left_out("cross_contrastive", student, bank, keys, bank_keys)
    logits = cosine_similarity_matrix(student, columns) / temperature
    loss = _info_nce(logits, left_out)
    if not symmetric:
        return loss
    batch = len(student)
    return (loss + _info_nce(logits[:, :batch].T, left_out[:, :batch].T)) / 2


def softmax_kl(
    student_logits: Float[Tensor, "b n"], teacher_logits: Float[Tensor, "b n"], left_out: Bool[Tensor, "b n"]
) -> Float[Tensor, ""]:
    """Mean over rows of the KL over the columns that are not left out; a row without any counts 0."""
    log_q = _leave_out(student_logits, left_out).log_softmax(-1)
    log_p = _leave_out(teacher_logits, left_out).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def _info_nce(logits: Float[Tensor, "b n"], left_out: Bool[Tensor, "b n"]) -> Float[Tensor, ""]:
    """Mean of log(1 + sum over negatives of exp(l_ij - l_ii)).

    The positive stays out of the sum: its gradient is then -Z / (1 + Z) instead of p - 1, which in float32 loses all its
    digits once the loss is small.
    """
    excess = logits - rearrange(logits.diagonal(), "b -> b 1")
    log_negatives = _leave_out(excess, left_out).logsumexp(-1)
    return torch.logaddexp(log_negatives, torch.zeros_like(log_negatives)).mean()


def _leave_out(logits: Float[Tensor, "b n"], left_out: Bool[Tensor, "b n"]) -> Float[Tensor, "b n"]:
    """Far below any logit, but finite: a row of nothing else is uniform with gradient 0, where -inf gives NaN."""
    return logits.masked_fill(left_out, torch.finfo(logits.dtype).min / 2)


def _columns(caller: str, student: Tensor, teacher: Tensor, bank: Tensor | None) -> Float[Tensor, "n d"]:
    check_pairs(caller, student, teacher)
    check_widths(caller, student, teacher)
    if bank is None:
        return teacher.detach()
    check_widths(caller, student, bank, "bank")
    return torch.cat([teacher.detach(), bank.detach()])


def _left_out(
    caller: str, student: Tensor, bank: Tensor | None, keys: Tensor | None, bank_keys: Tensor | None
) -> Bool[Tensor, "b n"]:
    """Column i of row i, and every column that carries row i's key. Bank rows without keys are other texts."""
    batch, extra = len(student), 0 if bank is None else len(bank)
    left_out = torch.eye(batch, batch + extra, dtype=torch.bool, device=student.device)
    _check_keys(caller, "keys", keys, batch)
    _check_keys(caller, "bank_keys", bank_keys, extra)
    if bank_keys is not None and (keys is None or bank is None):
        raise ValueError(f"{caller} got bank_keys without {'keys' if keys is None else 'bank'}. Give both, or neither.")
    if keys is not None:
        named = keys if bank_keys is None else torch.cat([keys, bank_keys])
        left_out[:, : len(named)] |= rearrange(keys, "b -> b 1") == rearrange(named, "n -> 1 n")
    return left_out


def _check_keys(caller: str, name: str, keys: Tensor | None, rows: int) -> None:
    if keys is not None and (keys.shape != (rows,) or keys.is_floating_point()):
        raise ValueError(
            f"{caller} needs one integer of {name} for each of {rows} rows, got {keys.dtype} {tuple(keys.shape)}."
        )


def check_temperatures(caller: str, temperature: float, teacher_temperature: float | None = None) -> None:
    named = {"temperature": temperature, "teacher_temperature": teacher_temperature}
    for name, value in named.items():
        if value is not None and not (0 < value < math.inf):
            raise ValueError(f"{caller} divides cosines by {name}: it must be above 0, got {value}. Try 0.05.")


class CrossKL(nn.Module):
    uses_bank: ClassVar[bool] = True

    def __init__(self, *, temperature: float = 0.05, teacher_temperature: float | None = None) -> None:
        super().__init__()
        check_temperatures("CrossKL", temperature, teacher_temperature)
        self.temperature, self.teacher_temperature = temperature, teacher_temperature

    def forward(
        self,
        student: Float[Tensor, "b d"],
        teacher: Float[Tensor, "b d"],
        bank: Float[Tensor, "n d"] | None = None,
        *,
        keys: Int[Tensor, "b"] | None = None,
        bank_keys: Int[Tensor, "n"] | None = None,
    ) -> Float[Tensor, ""]:
        return cross_kl(
            student,
            teacher,
            bank,
            keys=keys,
            bank_keys=bank_keys,
            temperature=self.temperature,
            teacher_temperature=self.teacher_temperature,
        )

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, teacher_temperature={self.teacher_temperature}"


class CrossContrastive(nn.Module):
    uses_bank: ClassVar[bool] = True

    def __init__(self, *, temperature: float = 0.05, symmetric: bool = False) -> None:
        super().__init__()
        check_temperatures("CrossContrastive", temperature)
        self.temperature, self.symmetric = temperature, symmetric

    def forward(
        self,
        student: Float[Tensor, "b d"],
        teacher: Float[Tensor, "b d"],
        bank: Float[Tensor, "n d"] | None = None,
        *,
        keys: Int[Tensor, "b"] | None = None,
        bank_keys: Int[Tensor, "n"] | None = None,
    ) -> Float[Tensor, ""]:
        return cross_contrastive(
            student,
            teacher,
            bank,
            keys=keys,
            bank_keys=bank_keys,
            temperature=self.temperature,
            symmetric=self.symmetric,
        )

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, symmetric={self.symmetric}"
