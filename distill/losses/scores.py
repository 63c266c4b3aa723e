"""Scores of candidates: the student's against the teacher's, for losses over lists. Raw scores, nothing is normalised.

Row i holds the scores of query i's candidates. Where the teacher's score is -inf there is no candidate: lists of unequal
length are padded with it, and what the student says there does not count.
"""

import math
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from distill.losses.cross import check_temperatures
from distill.similarity import check_device, check_tensor


def score_kl(
    student_scores: Float[Tensor, "q k"],
    teacher_scores: Float[Tensor, "q k"],
    *,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
) -> Float[Tensor, ""]:
    """KL from the teacher's to the student's distribution over the candidates of a query.

    Equals the mean over i of KL(softmax(t_i / teacher_temperature) || softmax(s_i / temperature)) over the candidates that
    are there; a query without any counts 0. Not multiplied by temperature^2: its gradient grows as 1 / temperature.
    The gradient keeps its digits where s is close to t; there is no second derivative. O(q * k).
    Cao et al. 2007 (ListNet); Hinton et al. 2015.
    """
    check_temperatures("score_kl", temperature, teacher_temperature, of="scores", usual=1.0)
    student, teacher, absent = _candidates("score_kl", student_scores, teacher_scores)
    scaled = teacher * (temperature / (teacher_temperature or temperature))  # 1 where both are the same: nothing rounds
    best = teacher.masked_fill(absent, -math.inf).argmax(-1, keepdim=True)
    difference = _difference_to(best, student, scaled) / temperature
    teacher_logits = (scaled - scaled.gather(-1, best)) / temperature
    return _RowKL.apply(difference, teacher_logits, absent).mean()


def margin_mse(student_scores: Float[Tensor, "q k"], teacher_scores: Float[Tensor, "q k"]) -> Float[Tensor, ""]:
    """How well the student's margins match the teacher's; the first candidate of a query is the positive.

    Equals the mean over all margins, i and j > 0, of ((s_i0 - s_ij) - (t_i0 - t_ij))^2 over the candidates that are
    there; without any margin it is 0. Two candidates are the classic MarginMSE. O(q * k). Hofstätter et al. 2020.
    """
    student, teacher, absent = _candidates("margin_mse", student_scores, teacher_scores)
    first = torch.zeros_like(absent[:, :1], dtype=torch.int64)
    counted = ~(absent | absent[:, :1])[:, 1:]
    errors = _difference_to(first, student, teacher)[:, 1:].masked_fill(~counted, 0.0)
    return errors.square().sum() / counted.sum().clamp(min=1)


def _candidates(
    caller: str, student: Float[Tensor, "q k"], teacher: Float[Tensor, "q k"]
) -> tuple[Float[Tensor, "q k"], Float[Tensor, "q k"], Bool[Tensor, "q k"]]:
    """Both in float32 (float64 stays), 0 where there is no candidate; and where that is."""
    for name, scores in {"student": student, "teacher": teacher}.items():
        check_tensor(caller, scores, f"{name} scores")
    check_device(caller, "teacher", teacher, student)
    if student.ndim != 2 or student.shape != teacher.shape or not student.numel():
        raise ValueError(
            f"{caller} compares scores (queries, candidates) one by one, got student {tuple(student.shape)} and teacher "
            f"{tuple(teacher.shape)}. Give both the same queries and candidates, at least one of each; pad short lists "
            f"with a teacher score of -inf."
        )
    absent = teacher.detach() == -math.inf
    wide = torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32
    return student.to(wide).masked_fill(absent, 0.0), teacher.detach().to(wide).masked_fill(absent, 0.0), absent


def _difference_to(
    column: Int[Tensor, "q 1"], student: Float[Tensor, "q k"], teacher: Float[Tensor, "q k"]
) -> Float[Tensor, "q k"]:
    """(s_ij - t_ij) - (s_ic - t_ic) for column c of each row, rounded once.

    A student may sit any constant above its teacher. What s - t then rounds away is kept as `lost` (Knuth's two-sum).
    """
    difference = student - teacher
    with torch.no_grad():
        back = difference - student
        lost = (student - (difference - back)) - (teacher + back)
    return (difference - difference.gather(-1, column)) + (lost - lost.gather(-1, column))


class _RowKL(torch.autograd.Function):
    """KL of each row from student minus teacher logits: q - p is p * expm1(log(q / p)), which autograd's q - p is not.

    At a difference of 1e-4 the float32 gradient of log_softmax is off by 1e-3, this one by 1e-6.
    """

    @staticmethod
    def forward(
        ctx: Any, difference: Float[Tensor, "q k"], teacher_logits: Float[Tensor, "q k"], absent: Bool[Tensor, "q k"]
    ) -> Float[Tensor, "q"]:
        log_p = teacher_logits.masked_fill(absent, torch.finfo(teacher_logits.dtype).min / 2).log_softmax(-1)
        log_ratio = difference - (log_p + difference).logsumexp(-1, keepdim=True)
        log_ratio = log_ratio - _excess(log_p, log_ratio).sum(-1, keepdim=True).log1p()  # so that q sums to 1 exactly
        excess = _excess(log_p, log_ratio)
        ctx.save_for_backward(excess)
        above_tangent = torch.where(
            log_ratio.abs() < 0.1, log_p.exp() * _exponential_above_tangent(log_ratio), excess - log_p.exp() * log_ratio
        )
        return above_tangent.sum(-1)  # sum of q - p - p log(q / p): as q - p sums to 0, the KL, and no term is below 0

    @staticmethod
    def backward(ctx: Any, gradient: Float[Tensor, "q"]) -> tuple[Float[Tensor, "q k"], None, None]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # compiled code has no second backward at all
            raise RuntimeError("score_kl computes its gradient in the forward pass: it has no second derivative.")
        (excess,) = ctx.saved_tensors
        return gradient[:, None] * excess, None, None


def _excess(log_p: Float[Tensor, "q k"], log_ratio: Float[Tensor, "q k"]) -> Float[Tensor, "q k"]:
    """q - p."""
    return torch.where(log_ratio < 1, log_p.exp() * log_ratio.expm1(), (log_p + log_ratio).exp() - log_p.exp())


def _exponential_above_tangent(x: Float[Tensor, "q k"]) -> Float[Tensor, "q k"]:
    """expm1(x) - x for |x| < 0.1, by its series: to the last digit of float64."""
    series = torch.zeros_like(x)
    for power in range(11, 1, -1):
        series = series * x + 1 / math.factorial(power)
    return series * x * x


class ScoreKL(nn.Module):
    """`score_kl` as a Module, which keeps its temperatures."""

    uses_bank: ClassVar[bool] = False

    def __init__(self, *, temperature: float = 1.0, teacher_temperature: float | None = None) -> None:
        super().__init__()
        check_temperatures("ScoreKL", temperature, teacher_temperature, of="scores", usual=1.0)
        self.temperature, self.teacher_temperature = temperature, teacher_temperature

    def forward(self, student_scores: Float[Tensor, "q k"], teacher_scores: Float[Tensor, "q k"]) -> Float[Tensor, ""]:
        return score_kl(
            student_scores,
            teacher_scores,
            temperature=self.temperature,
            teacher_temperature=self.teacher_temperature,
        )

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, teacher_temperature={self.teacher_temperature}"


class MarginMSE(nn.Module):
    """`margin_mse` as a Module."""

    uses_bank: ClassVar[bool] = False

    def forward(self, student_scores: Float[Tensor, "q k"], teacher_scores: Float[Tensor, "q k"]) -> Float[Tensor, ""]:
        return margin_mse(student_scores, teacher_scores)
