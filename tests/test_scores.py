"""Losses over lists of candidates: oracle, digits, padding, and what users hand in by mistake."""

import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import oracles
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distill import losses
from distill.losses import margin_mse, score_kl


@dataclass(frozen=True, kw_only=True)
class Case:
    function: str
    module: str
    options: dict[str, Any] = field(default_factory=dict)
    zero_at_teacher: bool = True

    @property
    def scale(self) -> float:
        """Of scores that neither saturate a softmax nor leave it flat."""
        return min(1.0, self.options.get("temperature", 1.0))

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        return getattr(losses, self.function)(student, teacher, **self.options)

    def oracle(self, student: Tensor, teacher: Tensor) -> float:
        return getattr(oracles, self.function)(student, teacher, **self.options)

    def __str__(self) -> str:
        return "-".join([self.function, *map(str, self.options)])


CASES = [
    Case(function="score_kl", module="ScoreKL"),
    Case(function="score_kl", module="ScoreKL", options={"temperature": 0.05}),
    Case(
        function="score_kl",
        module="ScoreKL",
        options={"temperature": 2.0, "teacher_temperature": 0.5},
        zero_at_teacher=False,
    ),
    Case(function="margin_mse", module="MarginMSE"),
]
every_loss = pytest.mark.parametrize("case", CASES, ids=str)
SIZES = [(1, 1), (1, 2), (5, 1), (2, 2), (7, 5), (300, 40)]
LOW = [torch.bfloat16, torch.float16]


def inputs(q: int, k: int, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    teacher = 3 * scale * torch.randn(q, k, dtype=torch.float64)
    return (teacher + scale * torch.randn(q, k, dtype=torch.float64) + 1).to(dtype), teacher.to(dtype)


def padded(q: int = 6, k: int = 5, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Lists of 0, 1, 2, ... candidates, and one whose positive alone is absent; the student says NaN, inf, numbers there."""
    student, teacher = inputs(q, k, dtype, scale)
    absent = torch.arange(k) >= torch.arange(q)[:, None]
    absent[-1, 0] = True
    teacher[absent] = -math.inf
    student[absent] = torch.tensor([math.nan, math.inf, -math.inf, 1e4], dtype=dtype).repeat(q * k)[: absent.sum()]
    return student, teacher


def gradient(loss: Callable[[Tensor], Tensor], student: Tensor) -> Tensor:
    leaf = student.detach().clone().requires_grad_()
    loss(leaf).backward()
    assert leaf.grad is not None
    return leaf.grad


@every_loss
@pytest.mark.parametrize(("q", "k"), SIZES)
def test_equals_the_oracle(case: Case, q: int, k: int) -> None:
    student, teacher = inputs(q, k)
    expected = torch.tensor(case.oracle(student, teacher), dtype=torch.float64)
    torch.testing.assert_close(case(student, teacher), expected, rtol=1e-9, atol=1e-12)
    single = case(student.float(), teacher.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), expected, rtol=2e-6, atol=1e-6)


def test_two_candidates_are_the_classic_margin_mse() -> None:
    student, teacher = inputs(7, 2)
    classic = F.mse_loss(student[:, 0] - student[:, 1], teacher[:, 0] - teacher[:, 1])
    torch.testing.assert_close(margin_mse(student, teacher), classic)


def test_the_kl_is_a_mean_over_queries_without_a_squared_temperature() -> None:
    student, teacher = inputs(7, 5)
    log_q, log_p = ((scores / 2).log_softmax(-1) for scores in (student, teacher))
    expected = F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    found = score_kl(student, teacher, temperature=2.0)
    torch.testing.assert_close(found, expected)
    turned = F.kl_div(log_p, log_q, log_target=True, reduction="batchmean")
    for wrong in (4 * expected, expected / 5, turned):
        assert not torch.allclose(found, wrong, rtol=0.01)


@every_loss
def test_gradcheck(case: Case) -> None:
    for q, k in [(1, 1), (1, 2), (3, 4)]:
        student, teacher = inputs(q, k)
        assert torch.autograd.gradcheck(lambda s: case(s, teacher), (student.requires_grad_(),))  # noqa: B023
    student, teacher = padded()
    present = (teacher > -math.inf).nonzero(as_tuple=True)
    values = student[present].requires_grad_()
    assert torch.autograd.gradcheck(lambda v: case(student.index_put(present, v), teacher), (values,))


@every_loss
def test_the_student_alone_gets_a_gradient(case: Case) -> None:
    student, teacher = (x.requires_grad_() for x in inputs(7, 5))
    case(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert student.grad.any()


def test_a_second_derivative_is_refused_not_wrong() -> None:
    student, teacher = inputs(3, 4)
    value = score_kl(student.requires_grad_(), teacher)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(value, student, create_graph=True)
    assert torch.autograd.gradgradcheck(lambda s: margin_mse(s, teacher), (student,))


@pytest.mark.parametrize("case", [case for case in CASES if case.zero_at_teacher], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_zero_with_zero_gradient_where_the_student_is_the_teacher(case: Case, dtype: torch.dtype) -> None:
    _, teacher = inputs(7, 5, dtype)
    assert 0 <= float(case(teacher, teacher)) < 1e-28
    assert gradient(lambda s: case(s, teacher), teacher).abs().max() < 1e-14
    assert float(case(teacher + 1e-3 * torch.randn_like(teacher), teacher)) > 0


@every_loss
def test_a_constant_added_to_a_list_does_not_matter(case: Case) -> None:
    student, teacher = inputs(7, 5)
    moved = student + torch.randn(7, 1, dtype=torch.float64), teacher + torch.randn(7, 1, dtype=torch.float64)
    torch.testing.assert_close(case(*moved), case(student, teacher))
    assert not torch.allclose(case(2 * student, 2 * teacher), case(student, teacher), rtol=1e-2)  # raw, not normalised


@every_loss
def test_order_of_queries_and_candidates_does_not_matter_but_their_pairing_does(case: Case) -> None:
    student, teacher = inputs(7, 5)
    before = case(student, teacher)
    rows, negatives = torch.tensor([3, 0, 6, 1, 5, 2, 4]), torch.tensor([0, 3, 1, 4, 2])
    torch.testing.assert_close(case(student[rows], teacher[rows]), before)
    torch.testing.assert_close(case(student[:, negatives], teacher[:, negatives]), before)
    assert not torch.allclose(case(student[rows], teacher), before, rtol=1e-2)
    positive_moved = torch.tensor([4, 1, 2, 3, 0])
    same = torch.allclose(case(student[:, positive_moved], teacher[:, positive_moved]), before, rtol=1e-2)
    assert same == (case.function == "score_kl")  # to margin_mse the first column is the positive


@every_loss
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *LOW])
def test_padding_is_left_out(case: Case, dtype: torch.dtype) -> None:
    student, teacher = padded(dtype=dtype, scale=case.scale)
    expected = case.oracle(student, teacher)
    assert expected > 0
    assert float(case(student, teacher)) == pytest.approx(expected, rel=1e-5)
    found = gradient(lambda s: case(s, teacher), student)
    assert found.isfinite().all()
    assert found.any()
    assert not found[teacher == -math.inf].any()
    zeros = gradient(lambda s: case(s, teacher), student.masked_fill(teacher == -math.inf, 0.0))
    assert torch.equal(found, zeros)


@every_loss
def test_more_padding_changes_nothing(case: Case) -> None:
    student, teacher = inputs(7, 5, scale=case.scale)
    wider = F.pad(student, (0, 3)), F.pad(teacher, (0, 3), value=-math.inf)
    torch.testing.assert_close(case(*wider), case(student, teacher))
    unmarked = F.pad(student, (0, 3)), F.pad(teacher, (0, 3))
    assert not torch.allclose(case(*unmarked), case(student, teacher), rtol=1e-2)


@every_loss
def test_queries_without_candidates_count_zero(case: Case) -> None:
    student, teacher = torch.randn(4, 5), torch.full((4, 5), -math.inf)
    assert float(case(student, teacher)) == 0
    assert not gradient(lambda s: case(s, teacher), student).any()


def test_an_empty_query_halves_the_kl_of_two_but_leaves_the_margins() -> None:
    student, teacher = inputs(2, 5)
    emptied = teacher.clone()
    emptied[1] = -math.inf
    torch.testing.assert_close(score_kl(student, emptied), score_kl(student[:1], teacher[:1]) / 2)
    torch.testing.assert_close(margin_mse(student, emptied), margin_mse(student[:1], teacher[:1]))


@pytest.mark.parametrize("case", [case for case in CASES if case.zero_at_teacher], ids=str)
@pytest.mark.parametrize("distance", [10, 1, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5])
@pytest.mark.parametrize("above", [0, 20])
def test_the_float32_gradient_keeps_its_digits_near_the_teacher(case: Case, distance: float, above: float) -> None:
    teacher = 3 * case.scale * torch.randn(64, 50)
    student = teacher + above + distance * case.scale * torch.randn(64, 50)
    truth = gradient(lambda s: case(s, teacher.double()), student.double())
    found = gradient(lambda s: case(s, teacher), student)
    assert (found - truth).norm() / truth.norm() < 1e-6
    assert float(case(student, teacher)) == pytest.approx(float(case(student.double(), teacher.double())), rel=1e-6)


def test_what_autograd_makes_of_log_softmax_near_the_teacher_would_not_pass() -> None:
    teacher = 3 * torch.randn(64, 50)
    student = teacher + 1e-4 * torch.randn(64, 50)

    def naive(scores: Tensor) -> Tensor:
        target = teacher.to(scores.dtype).log_softmax(-1)
        return F.kl_div(scores.log_softmax(-1), target, log_target=True, reduction="batchmean")

    truth = gradient(naive, student.double())
    assert (gradient(naive, student) - truth).norm() / truth.norm() > 1e-4
    assert (gradient(lambda s: score_kl(s, teacher), student) - truth).norm() / truth.norm() < 1e-6


@every_loss
def test_scores_far_apart_stay_finite(case: Case) -> None:
    student, teacher = torch.tensor([[3e4, -3e4, 0.0]]), torch.tensor([[-3e4, 3e4, 0.0]])
    expected = 9e9 if case.function == "margin_mse" else 6e4 / case.options.get("temperature", 1.0)
    assert float(case(student, teacher)) == pytest.approx(expected, rel=1e-6)
    assert gradient(lambda s: case(s, teacher), student).isfinite().all()


@every_loss
@pytest.mark.parametrize("dtype", LOW)
def test_16_bit_inputs_cost_no_more_than_their_own_rounding(case: Case, dtype: torch.dtype) -> None:
    student, teacher = inputs(64, 16, dtype, case.scale)
    value = case(student, teacher)
    assert value.dtype == torch.float32
    assert float(value) == pytest.approx(float(case(student.double(), teacher.double())), rel=1e-5)
    found = gradient(lambda s: case(s, teacher), student).double()
    truth = gradient(lambda s: case(s, teacher.double()), student.double())
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert ((found - truth).abs() <= torch.finfo(dtype).eps * truth.abs() + 1e-5 * truth.abs().max() + smallest).all()


@every_loss
@pytest.mark.parametrize("dtype", LOW)
def test_autocast_changes_nothing(case: Case, dtype: torch.dtype) -> None:
    student, teacher = inputs(16, 5, torch.float32)

    def under_autocast(scores: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=dtype):
            return case(scores, teacher)

    assert torch.equal(under_autocast(student), case(student, teacher))
    plain = gradient(lambda s: case(s, teacher), student)
    assert torch.equal(gradient(under_autocast, student), plain)


@every_loss
@pytest.mark.usefixtures("unchecked")
def test_what_would_broadcast_is_refused(case: Case) -> None:
    student, teacher = inputs(4, 3)
    for scores in (teacher[:1], teacher[:, :1], teacher[0], teacher[:, 0], teacher.T, teacher[None]):
        with pytest.raises(ValueError, match=rf"{case.function} compares scores .*student \(4, 3\) and teacher \("):
            case(student, scores)
    for empty in (student[:0], student[:, :0]):
        with pytest.raises(ValueError, match=r"at least one of each.*-inf"):
            case(empty, empty)


@every_loss
@pytest.mark.usefixtures("unchecked")
def test_what_is_no_tensor_or_elsewhere_is_refused(case: Case) -> None:
    student, teacher = inputs(4, 3)
    with pytest.raises(
        TypeError, match=rf"{case.function} takes teacher scores as a torch\.Tensor, got numpy\.ndarray"
    ):
        case(student, teacher.numpy())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"student scores as a torch\.Tensor, got builtins\.list"):
        case(student.tolist(), teacher)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"one device, got teacher on meta"):
        case(student, teacher.to("meta"))


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("name", ["temperature", "teacher_temperature"])
def test_temperatures_are_above_zero(name: str, temperature: float) -> None:
    student, teacher = inputs(4, 3)
    with pytest.raises(ValueError, match=rf"score_kl divides scores by {name}: .*Try 1.0"):
        score_kl(student, teacher, **{name: temperature})
    with pytest.raises(ValueError, match=rf"ScoreKL divides scores by {name}"):
        losses.ScoreKL(**{name: temperature})


@every_loss
def test_the_module_is_the_function(case: Case) -> None:
    module = getattr(losses, case.module)(**case.options)
    student, teacher = inputs(7, 5)
    assert torch.equal(module(student, teacher), case(student, teacher))
    assert module.uses_bank is False
    assert not list(module.parameters())
    assert all(f"{name}={value}" in repr(module) for name, value in case.options.items())


COMPILED = """
import math, torch
from torch._dynamo.testing import CompileCounterWithBackend
from distill.losses import margin_mse, score_kl

torch.manual_seed(0)
torch.set_num_threads(1)
for loss in (score_kl, margin_mse):
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=counter)
    for q, k in [(7, 5), (12, 5), (64, 9)]:
        teacher = 3 * torch.randn(q, k)
        student = (teacher + 0.01 * torch.randn(q, k)).requires_grad_()
        teacher[2:, 3:] = -math.inf
        values = loss(student, teacher), compiled(student, teacher)
        gradients = [torch.autograd.grad(value, student)[0] for value in values]
        assert abs(values[0] - values[1]) <= 1e-5 * abs(values[0]), values
        assert (gradients[0] - gradients[1]).norm() <= 1e-5 * gradients[0].norm()
    assert counter.frame_count == 1, counter.frame_count
"""


def test_compiles_whole_and_once_for_every_size() -> None:
    """In a process of its own: the shape checks of the tests cannot be compiled."""
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.usefixtures("unchecked")
def test_a_temperature_is_not_learned() -> None:
    with pytest.raises(TypeError, match="takes temperature as a number, got a tensor: it is not learned"):
        score_kl(torch.randn(2, 3), torch.randn(2, 3), temperature=torch.nn.Parameter(torch.tensor(0.7)))  # type: ignore[arg-type]
