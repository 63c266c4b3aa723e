"""The losses from moments: the same numbers as from the matrix, whatever the tiles, the rows and the processes."""

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracles
import processes
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from distill import losses
from distill.streaming import engine, moments

LOSSES: dict[str, Callable[..., Tensor]] = {
    "gram_mse": losses.gram_mse,
    "cross_mse": losses.cross_mse,
    "similarity_preserving": losses.similarity_preserving,
    "cka": losses.cka,
}
every_loss = pytest.mark.parametrize("name", LOSSES)
every_pair = pytest.mark.parametrize(
    ("name", "e"), [(n, e) for n in LOSSES for e in (16, 19) if (n, e) != ("cross_mse", 19)]
)
both_forms = pytest.mark.parametrize("direct", [0.0, math.inf], ids=["moments", "matrix"])


def naive(name: str, student: Tensor, teacher: Tensor, bank: Tensor | None = None) -> Tensor:
    """Autograd through the whole matrix."""
    s, t = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)
    if name == "gram_mse":
        return (s @ s.T - t @ t.T).square().mean()
    if name == "cross_mse":
        return ((s - t) @ (t if bank is None else torch.cat([t, F.normalize(bank, dim=-1)])).T).square().mean()
    if name == "similarity_preserving":
        return (F.normalize(s @ s.T, dim=-1) - F.normalize(t @ t.T, dim=-1)).square().mean()
    if len(s) == 1:
        return 0 * s.sum()
    x, y = s - s.mean(0), t - t.mean(0)
    return 1 - (x.T @ y).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm())


def rows(
    b: int, e: int = 16, dtype: torch.dtype = torch.float64, noise: float = 0.5, d: int = 16
) -> tuple[Tensor, Tensor]:
    teacher = torch.randn(b, e, dtype=torch.float64)
    return (teacher[:, :d] + noise * torch.randn(b, d, dtype=torch.float64)).to(dtype), teacher.to(dtype)


def both(loss: Callable[..., Tensor], student: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    leaf = student.detach().clone().requires_grad_()
    value = loss(leaf, *args)
    value.backward()
    assert leaf.grad is not None
    return value.detach(), leaf.grad


def error(found: Tensor, truth: Tensor) -> float:
    """The largest, relative to the largest entry."""
    return float((found - truth).abs().max() / truth.abs().max())


@every_pair
@pytest.mark.parametrize("b", [1, 2, 7, 1000])
def test_from_moments_and_from_the_matrix_come_the_same_numbers(
    name: str, e: int, b: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        student, teacher = rows(b, e, dtype)
        true_value, true_gradient = both(lambda s, t: naive(name, s, t), student.double(), teacher.double())
        for direct in (0.0, math.inf):
            monkeypatch.setattr(moments, "DIRECT", direct)
            value, gradient = both(LOSSES[name], student, teacher)
            assert value.dtype == gradient.dtype == dtype
            assert abs(float(value - true_value)) < tolerance
            assert (gradient - true_gradient).abs().max() < tolerance * true_gradient.abs().max().clamp(min=1e-4)


def test_the_matrix_is_made_for_few_rows_only(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    for name in ("_gram_mse_direct", "_cross_mse_direct", "_similarity_preserving_direct"):
        form = getattr(moments, name)
        monkeypatch.setattr(
            moments, name, lambda share, *args, form=form: (made.append(share.total), form(share, *args))[1]
        )
    for b in (4, 200):
        for name, loss in LOSSES.items():
            loss(*rows(b))
            assert made == ([b] if b == 4 and name != "cka" else [])
            made.clear()


@every_pair
@both_forms
def test_tiles_change_nothing(name: str, e: int, direct: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "DIRECT", direct)
    student, teacher = rows(10, e)
    value, gradient = both(LOSSES[name], student, teacher)
    monkeypatch.setattr(engine, "TILE", 3)
    monkeypatch.setattr(engine, "KEPT", 0)
    monkeypatch.setattr("distill.streaming.joint.BLOCK", 5)
    other_value, other_gradient = both(LOSSES[name], student, teacher)
    torch.testing.assert_close(other_value, value, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(other_gradient, gradient, rtol=1e-10, atol=1e-14)


@both_forms
def test_bank_in_tiles(direct: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "DIRECT", direct)
    monkeypatch.setattr(engine, "TILE", 3)
    (student, teacher), bank = rows(10), torch.randn(8, 16, dtype=torch.float64)
    value, gradient = both(losses.cross_mse, student, teacher, bank)
    true_value, true_gradient = both(lambda s, t: naive("cross_mse", s, t, bank), student, teacher)
    torch.testing.assert_close(value, true_value)
    torch.testing.assert_close(gradient, true_gradient)
    torch.testing.assert_close(losses.cross_mse(student, teacher, bank[:0]), losses.cross_mse(student, teacher))


@every_pair
@both_forms
def test_gradcheck(name: str, e: int, direct: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "DIRECT", direct)
    monkeypatch.setattr(engine, "TILE", 3)
    student, teacher = rows(5, 4 if e == 16 else 6, d=4)
    student[2], student[4], teacher[4] = student[1], student[0], teacher[0]
    teacher[3] = 0
    assert torch.autograd.gradcheck(lambda s: LOSSES[name](s, teacher), (student.requires_grad_(),))


def turned(student: Tensor) -> Tensor:
    return student @ torch.linalg.qr(torch.randn(student.shape[1], student.shape[1], dtype=torch.float64)).Q


@every_pair
@both_forms
@pytest.mark.parametrize("cone", [0.0, 3.0, 10.0])  # cosines of about 0, .9, .99
@pytest.mark.parametrize("turn", [False, True])
@pytest.mark.parametrize("noise", [0.05, 1e-3])
def test_float32_is_exact_near_convergence(
    name: str, e: int, direct: float, cone: float, turn: bool, noise: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moments, "DIRECT", direct)
    teacher = torch.randn(400, 64 + e - 16, dtype=torch.float64) + cone * torch.randn(64 + e - 16, dtype=torch.float64)
    if e == 19:
        teacher[:, 64:] *= 0.01  # so that the student can be near
    student = teacher[:, :64] + noise * torch.randn(400, 64, dtype=torch.float64)
    student, teacher = (turned(student) if turn else student).float(), teacher.float()
    truth = both(lambda s, t: naive(name, s, t), student.double(), teacher.double())
    value, gradient = both(LOSSES[name], student, teacher)
    assert float(value) == pytest.approx(float(truth[0]), rel=1e-5, abs=1e-14)
    assert error(gradient, truth[1]) < 1e-5


def test_plain_float32_moments_lose_what_is_kept_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """What defends them, one after the other off: float64 where squares cancel, float64 in a cone, and differences of rows."""
    monkeypatch.setattr(moments, "DIRECT", 0.0)
    student, teacher = rows(400, 64, noise=1e-3, d=64)
    narrow = student + 30, teacher + 30
    cases = {"CANCELLED": (turned(student), teacher), "NARROW": narrow}
    for constant, pair in cases.items():
        _, truth = both(lambda s, t: naive("gram_mse", s, t), *(x.float().double() for x in pair))
        assert error(both(losses.gram_mse, *(x.float() for x in pair))[1], truth) < 1e-5
        with monkeypatch.context() as patch:
            patch.setattr(moments, constant, -1.0 if constant == "CANCELLED" else 2.0)
            assert error(both(losses.gram_mse, *(x.float() for x in pair))[1], truth) > 1e-5
    _, truth = both(lambda s, t: naive("gram_mse", s, t), student.float().double(), teacher.float().double())
    assert error(both(lambda s, t: naive("gram_mse", s, t), student.float(), teacher.float())[1], truth) > 1e-5


@every_loss
def test_no_variation_and_zero_rows(name: str) -> None:
    for dtype in (torch.float64, torch.float32):
        student, teacher = rows(6, dtype=dtype)
        lengths = torch.rand(6, 1, dtype=dtype) + 0.5
        for s, t in (
            (student, teacher[:1] * lengths),
            (student[:1] * lengths, teacher),
            (student * 0, teacher),
            (student, teacher * 0),
            (student * 0, teacher * 0),
        ):
            value, gradient = both(LOSSES[name], s, t)
            assert float(value) == pytest.approx(getattr(oracles, name)(s, t), rel=1e-5, abs=1e-12)
            assert gradient.isfinite().all()
            assert name != "cka" or (float(value) == 0 and not gradient.any())
            assert s.any() or not gradient.any()


@every_loss
def test_rows_of_any_length(name: str) -> None:
    """Squares of these vanish or overflow in the dtype of the rows."""
    for dtype, lengths in (
        (torch.float32, (1e-30, 1e30)),
        (torch.float64, (1e-200, 1e200)),
        (torch.float16, (1e-4, 1e3)),
    ):
        student, teacher = rows(6, dtype=dtype)
        expected = LOSSES[name](student, teacher)
        for length in lengths:
            value, gradient = both(LOSSES[name], student * length, teacher / length)
            torch.testing.assert_close(value, expected, rtol=0.1 if dtype == torch.float16 else 1e-5, atol=0)
            assert gradient.isfinite().all()


@every_loss
def test_other_dtypes_meet(name: str) -> None:
    student, teacher = rows(6, dtype=torch.bfloat16)
    expected, _ = both(LOSSES[name], student.double(), teacher.double())
    for s, t in ((student, teacher.float()), (student.float(), teacher), (student, teacher.double())):
        value, gradient = both(LOSSES[name], s, t)
        assert (value.dtype, gradient.dtype) == (torch.float32, s.dtype)
        torch.testing.assert_close(value, expected.float())


def test_long_banks_of_narrow_vectors_add_up() -> None:
    student, teacher, bank = torch.randn(16, 8), torch.randn(16, 8), torch.randn(200_000, 8) + 1
    truth = losses.cross_mse(student.double(), teacher.double(), bank.double())
    assert abs(losses.cross_mse(student, teacher, bank) - truth) < 1e-5 * truth


@every_loss
def test_a_second_derivative_raises(name: str) -> None:
    student, teacher = rows(6)
    student.requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(LOSSES[name](student, teacher), student, create_graph=True)


@every_loss
def test_without_gradient_the_value_is_the_same(name: str) -> None:
    for b in (6, 200):
        student, teacher = rows(b)
        assert torch.equal(LOSSES[name](student, teacher), both(LOSSES[name], student, teacher)[0])


@every_loss
@pytest.mark.usefixtures("unchecked")
def test_compiled_whole_and_for_any_number_of_rows(name: str) -> None:
    compiled = torch.compile(lambda s, t: 2 * LOSSES[name](3 * s, t), fullgraph=True, dynamic=True, backend="aot_eager")
    for b in (5, 9, 200):
        student, teacher = rows(b, dtype=torch.float32)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value, gradient = both(compiled, student, teacher)
        expected, expected_gradient = both(lambda s, t: 2 * LOSSES[name](3 * s, t), student, teacher)
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(gradient, expected_gradient)


def test_memory_is_that_of_rows_and_moments() -> None:
    """65,536 rows: the matrix would be 17 GB."""
    student, teacher = rows(65536, dtype=torch.float32)
    for loss in LOSSES.values():
        value, gradient = both(loss, student, teacher)
        assert value > 0
        assert gradient.abs().max() > 0


# Processes

SIZES = {2: [[6, 6], [9, 3], [12, 0], [0, 12]], 3: [[4, 4, 4], [0, 7, 5], [1, 11, 0]]}


def shares(sizes: list[list[int]]) -> dict[str, Any]:
    """In one of several processes: errors of its own rows' value and gradient, of the mean of local losses, and what was sent."""
    found: dict[str, Any] = {"wrong": [], "local": [], "sent": {}}
    generator = torch.Generator().manual_seed(5)
    draw = [torch.randn(n, e, generator=generator, dtype=torch.float64) for n, e in ((12, 4), (12, 4), (12, 6), (5, 4))]
    for each in sizes:
        own = slice(sum(each[: dist.get_rank()]), sum(each[: dist.get_rank() + 1]))
        for name, loss in LOSSES.items():
            for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
                student, teacher, wider, bank = (x.to(dtype) for x in draw)
                others = [(teacher,), (teacher, bank)] if name == "cross_mse" else [(teacher,), (wider,)]
                for direct in (0.0, math.inf):
                    moments.DIRECT = direct
                    for t, *rest in others:
                        value, gradient = both(loss, student, t, *rest)
                        with engine.sharing(engine.Share(each, dist.get_rank())):
                            mine = both(loss, student[own], t[own], *rest)
                        worst = [abs(float(mine[0] - value)), float((mine[1] - gradient[own]).abs().sum())]
                        if max(worst) > tolerance:
                            found["wrong"].append([name, str(dtype), direct, each, worst])
            if min(each):
                part = loss(student[own], teacher[own]) / len(each)
                dist.all_reduce(part)
                found["local"].append(abs(float(part - loss(student, teacher))))
    moments.DIRECT = 0.0
    for name, loss in LOSSES.items():
        found["sent"][name] = _sent(loss, *(x.float() for x in draw[:2]))
    return found


def _sent(loss: Callable[..., Tensor], student: Tensor, teacher: Tensor) -> dict[str, int]:
    """Collectives of forward and of backward, and the most elements that one of them carries."""
    calls: list[int] = []
    reduce, gather = dist.all_reduce, dist.all_gather
    dist.all_reduce = lambda values, **options: (calls.append(values.numel()), reduce(values, **options))[1]
    dist.all_gather = lambda parts, values, **options: (calls.append(-1), gather(parts, values, **options))[1]
    leaf = student.clone().requires_grad_()
    with engine.sharing(engine.Share([len(student)] * dist.get_world_size(), dist.get_rank())):
        value = loss(leaf, teacher)
    forward = len(calls)
    value.backward()
    dist.all_reduce, dist.all_gather = reduce, gather
    return {"forward": forward, "backward": len(calls) - forward, "gathers": calls.count(-1), "largest": max(calls)}


@pytest.mark.parametrize("world", [2, 3])
def test_each_process_has_the_value_of_all_rows_and_the_gradient_of_its_own(world: int, tmp_path: Path) -> None:
    for result in processes.run(shares, world, tmp_path, sizes=SIZES[world]):
        assert result["wrong"] == []
        assert result["local"]
        assert min(result["local"]) > 1e-4  # means of local losses are something else
        for sent in result["sent"].values():
            assert (sent["backward"], sent["gathers"]) == (0, 0)
            assert sent["forward"] <= 4
            assert sent["largest"] == 4 * 4 or sent["largest"] == 8 * 8
