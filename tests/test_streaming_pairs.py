"""What is special about rkd_distance, rkd_angle and rank_hinge: derivatives by hand, tiles, ties, kinks, memory."""

import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import oracles
import processes
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from distill import losses
from distill.losses import rank_hinge, rkd_angle, rkd_distance
from distill.similarity import evenly_spaced
from distill.streaming import engine, order, pairs

SIZES = [1, 2, 3, 7, 40]


def unit(rows: Tensor) -> Tensor:
    zero = (rows == 0).all(-1, keepdim=True)
    return torch.where(zero, 0.0, rows / torch.where(zero, 1.0, rows).norm(dim=-1, keepdim=True))


def lengths(differences: Tensor) -> Tensor:
    """With gradient 0 at 0."""
    squares = differences.square().sum(-1)
    return torch.where(squares > 0, torch.where(squares > 0, squares, 1.0).sqrt(), 0.0)


def naive_distance(student: Tensor, teacher: Tensor) -> Tensor:
    distances = [lengths(rows[:, None] - rows) for rows in (unit(student), unit(teacher))]
    return F.smooth_l1_loss(*(d / d[d > 0].mean() if d.any() else d for d in distances))


def naive_angle(student: Tensor, teacher: Tensor, anchors: int | None = None) -> Tensor:
    chosen = torch.linspace(0, len(student), (anchors or len(student)) + 1)[:-1].long()

    def cosines(rows: Tensor) -> Tensor:
        spokes = rows - rows[chosen][:, None]
        length = lengths(spokes)[..., None]
        directions = torch.where(length > 0, spokes / torch.where(length > 0, length, 1.0), 0.0)
        return directions @ directions.mT

    return F.smooth_l1_loss(cosines(unit(student)), cosines(unit(teacher)))


def naive_hinge(student: Tensor, teacher: Tensor, margin: float = 0.015) -> Tensor:
    i, j = torch.triu_indices(len(student), len(student), 1)
    s, t = ((unit(rows) @ unit(rows).T)[i, j] for rows in (student, teacher))
    higher = t[:, None] - t > 1e-12
    return ((margin - (s[:, None] - s)).clamp(min=0) * higher).sum() / higher.sum().clamp(min=1)


LOSSES = {
    "rkd_distance": (rkd_distance, naive_distance),
    "rkd_angle": (rkd_angle, naive_angle),
    "rkd_angle at some anchors": (
        lambda s, t: rkd_angle(s, t, anchors=len(s) // 2 + 1),
        lambda s, t: naive_angle(s, t, anchors=len(s) // 2 + 1),
    ),
    "rank_hinge": (rank_hinge, naive_hinge),
    "rank_hinge, wide": (lambda s, t: rank_hinge(s, t, margin=0.3), lambda s, t: naive_hinge(s, t, margin=0.3)),
}
every_loss = pytest.mark.parametrize(("loss", "naive"), LOSSES.values(), ids=LOSSES)


def inputs(b: int, d: int = 8, e: int = 11, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    teacher = torch.randn(b, e, dtype=torch.float64)
    return (teacher[:, :d] + 0.5 * torch.randn(b, d, dtype=torch.float64)).to(dtype), teacher.to(dtype)


def with_copies(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Copies on both sides and on one, zero rows on both sides and on one."""
    for rows, copies, zeros in ((student, {1: 0, 5: 2}, [3, 4]), (teacher, {1: 0, 6: 0}, [4, 5])):
        for copy, first in copies.items():
            rows[copy] = rows[first]
        rows[zeros] = 0
    return student, teacher


def value_and_gradient(loss: Callable[..., Tensor], student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    leaf = student.detach().clone().requires_grad_()
    value = loss(leaf, teacher)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


@every_loss
@pytest.mark.parametrize("b", SIZES)
@pytest.mark.parametrize("tile", [None, 3])
def test_value_and_gradient_equal_autograd_of_the_naive_formula(
    loss: Callable, naive: Callable, b: int, tile: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if tile:
        monkeypatch.setattr(engine, "TILE", tile)
        monkeypatch.setattr(engine, "KEPT", 20)
    student, teacher = inputs(b)
    for pair in [(student, teacher)] + ([with_copies(student.clone(), teacher.clone())] if b >= 7 else []):
        expected, truth = value_and_gradient(naive, *pair)
        value, gradient = value_and_gradient(loss, *pair)
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-15)
        torch.testing.assert_close(gradient, truth, rtol=1e-9, atol=1e-14)
        with torch.no_grad():
            torch.testing.assert_close(loss(*pair), expected, rtol=1e-10, atol=1e-15)


@every_loss
def test_float32_keeps_the_gradient(loss: Callable, naive: Callable) -> None:
    student, teacher = inputs(100, d=64, e=96, dtype=torch.float32)
    _, truth = value_and_gradient(loss, student.double(), teacher.double())
    _, gradient = value_and_gradient(loss, student, teacher)
    assert gradient.dtype == torch.float32
    assert (gradient - truth).abs().max() <= 1e-5 * truth.abs().max()


@pytest.mark.parametrize("loss", [rkd_distance, rkd_angle])
def test_a_student_whose_rows_are_nearly_alike_keeps_its_gradient(loss: Callable) -> None:
    """As the untrained ones are: cosines of .999998 hold two digits of a distance."""
    _, teacher = inputs(50, e=64, dtype=torch.float32)
    student = torch.randn(1, 64) + 1e-3 * torch.randn(50, 64)
    _, truth = value_and_gradient(loss, student.double(), teacher.double())
    _, gradient = value_and_gradient(loss, student, teacher)
    error = (gradient - truth).abs().max() / truth.abs().max()
    assert error < 1e-3

    def by_cosines(rows: Tensor) -> Tensor:
        return (2 - 2 * F.normalize(rows) @ F.normalize(rows).T).clamp(min=0).sqrt()

    exact = by_cosines(student.double())
    assert (by_cosines(student) - exact).abs().max() > 0.05 * exact.max()


@every_loss
def test_the_gradient_of_large_and_of_tiny_rows(loss: Callable, naive: Callable) -> None:
    student, teacher = inputs(7)
    _, truth = value_and_gradient(loss, student, teacher)
    for scale in (1e-30, 1e30):
        _, gradient = value_and_gradient(loss, student.float() * scale, teacher.float() / scale)
        torch.testing.assert_close(gradient.double() * scale, truth, rtol=1e-4, atol=1e-6 * float(truth.abs().max()))


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_that_are_all_alike_have_no_gradient(loss: Callable, naive: Callable, dtype: torch.dtype) -> None:
    student, teacher = inputs(9, dtype=dtype)
    same = student[:1] * torch.rand(9, 1, dtype=dtype).add(
        0.5
    )  # of many lengths: unit rows that differ by their rounding
    value, gradient = value_and_gradient(loss, same, teacher)
    assert value.isfinite()
    if loss in (rkd_distance, rkd_angle):
        assert not gradient.any()
    assert gradient.isfinite().all()
    assert float(loss(teacher[:1].expand(9, -1), teacher[:1].expand(9, -1))) == 0


@every_loss
def test_a_second_derivative_is_refused(loss: Callable, naive: Callable) -> None:
    student, teacher = inputs(7)
    student.requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss(student, teacher), student, create_graph=True)


@every_loss
def test_gradcheck_with_copies_and_zero_rows_of_the_teacher(loss: Callable, naive: Callable) -> None:
    student, teacher = inputs(7, d=3)
    _, teacher = with_copies(student.clone(), teacher)
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher), (student.requires_grad_(),))


def test_angles_at_evenly_spaced_anchors() -> None:
    assert evenly_spaced(7, 2048) == [*range(7)]
    assert evenly_spaced(7, 3) == [0, 2, 4]
    student, teacher = inputs(7)
    for anchors in (1, 3, 7):
        value = rkd_angle(student, teacher, anchors=anchors)
        assert float(value) == pytest.approx(oracles.rkd_angle(student, teacher, anchors=anchors), rel=1e-10)
    assert torch.equal(rkd_angle(student, teacher, anchors=7), rkd_angle(student, teacher))
    assert torch.equal(rkd_angle(student, teacher, anchors=999), rkd_angle(student, teacher))
    assert not torch.allclose(rkd_angle(student, teacher, anchors=3), rkd_angle(student, teacher), rtol=1e-3)


def test_ties_of_the_teacher_order_nothing() -> None:
    student, teacher = inputs(40, d=64, e=96, dtype=torch.float32)
    teacher[20:] = teacher[:20]  # each cosine of two texts occurs four times
    value, gradient = value_and_gradient(rank_hinge, student, teacher)
    expected, truth = value_and_gradient(naive_hinge, student.double(), teacher.double())
    torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient.double(), truth, rtol=1e-5, atol=1e-6 * float(truth.abs().max()))
    cosines = order._teacher_cosines(teacher)
    assert torch.equal(cosines[:20], cosines[20:])
    assert torch.equal(cosines[:, :20], cosines[:, 20:])
    assert torch.equal(cosines, cosines.T)
    assert (cosines.diagonal() == 1).all()


def test_copies_are_found_by_their_bits() -> None:
    rows = torch.tensor([[0.0, 3.0], [1.0, 2.0], [-0.0, 3.0], [3.0, 0.0], [1.0, 2.0], [2.0, 1.0], [0.0, 3.0]])
    for dtype in (torch.float16, torch.float32, torch.float64):
        assert order._first_copies(rows.to(dtype)).tolist() == [0, 1, 0, 3, 1, 5, 0]
    many = torch.randint(2, (300, 12)).double()
    first = [next(j for j in range(300) if torch.equal(many[j], many[i])) for i in range(300)]
    assert order._first_copies(many).tolist() == first
    assert len(set(first)) > 200


def test_an_order_of_nothing_is_zero() -> None:
    student, teacher = inputs(6)
    for rows in ((student[:1], teacher[:1]), (student[:2], teacher[:2]), (student, teacher[:1].expand(6, -1))):
        value, gradient = value_and_gradient(rank_hinge, *rows)
        assert float(value) == 0
        assert not gradient.any()


def test_a_hinge_at_its_kink_is_not_active() -> None:
    """Cosines 0 and 1/2 exactly: with margin 1/2 a pair is just high enough, and with a little more it is not."""
    teacher = torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 0, 0], [0, 0, 1, 0]], dtype=torch.float64)
    assert float(rank_hinge(teacher, teacher, margin=0.5)) == 0
    assert not value_and_gradient(lambda s, t: rank_hinge(s, t, margin=0.5), teacher, teacher)[1].any()
    assert float(rank_hinge(teacher, teacher, margin=0.75)) == pytest.approx(0.25)
    assert float(rank_hinge(teacher, teacher, margin=0.0)) == 0


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 31, 64, 65])
def test_counting_by_a_wavelet_tree(count: int) -> None:
    ranks = torch.randperm(count, dtype=torch.int32)
    upto, limit = torch.cartesian_prod(*[torch.arange(count + 1, dtype=torch.int32)] * 2).T.contiguous()
    places = torch.arange(count, dtype=torch.int32)
    expected = ((places < upto[:, None]) & (ranks < limit[:, None])).sum(-1)
    assert torch.equal(order.count_lower(ranks, upto, limit).long(), expected)


@pytest.mark.usefixtures("unchecked")
def test_options_that_mean_nothing_are_refused() -> None:
    student, teacher = inputs(4)
    for anchors in (0, -1):
        with pytest.raises(ValueError, match=rf"rkd_angle takes at least one row as anchor, got anchors={anchors}"):
            rkd_angle(student, teacher, anchors=anchors)
        with pytest.raises(ValueError, match="RKDAngle takes at least one row"):
            losses.RKDAngle(anchors=anchors)
    for margin in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=rf"rank_hinge takes a margin of cosine, 0 or more, got {margin}.*0.015"):
            rank_hinge(student, teacher, margin=margin)
        with pytest.raises(ValueError, match="RankHinge takes a margin"):
            losses.RankHinge(margin=margin)
    with pytest.raises(ValueError, match="the pairs of at most 65,536 rows, got 65,537"):
        rank_hinge(torch.ones(65537, 1), torch.ones(65537, 1))


def shares(sizes: list[int]) -> list[list]:
    """In one of several processes: what differs from the whole batch, where shares are several tiles long."""
    rank = dist.get_rank()
    share = engine.Share(sizes, rank)
    own = slice(share.start, share.start + sizes[rank])
    torch.manual_seed(0)
    student, teacher = with_copies(*inputs(sum(sizes)))
    wrong = []
    for tile, kept in ((1024, 2**25), (3, 20), (3, 2**25)):
        engine.TILE, engine.KEPT = tile, kept
        for name, (loss, _) in LOSSES.items():
            if name != "rkd_angle at some anchors":  # their number must not depend on the share
                value, gradient = value_and_gradient(loss, student, teacher)
                with engine.sharing(share):
                    leaf = student[own].requires_grad_(sizes[rank] > 0)
                    ours = loss(leaf, teacher[own])
                if sizes[rank]:
                    error = (torch.autograd.grad(ours, leaf)[0] - gradient[own]).abs().max() / gradient.abs().max()
                    wrong += [[name, tile, kept, float(error)]] if error > 1e-12 else []
                wrong += [[name, tile, kept, ours.item(), value.item()]] if abs(ours - value) > 1e-14 else []
    return wrong


@pytest.mark.parametrize("sizes", [[11, 8], [5, 0, 9]])
def test_shares_of_several_tiles_add_up_to_the_batch(sizes: list[int], tmp_path: Path) -> None:
    assert processes.run(shares, len(sizes), tmp_path, sizes=sizes) == [[]] * len(sizes)


def memory() -> dict[str, float]:
    """In a process of its own: megabytes that each call adds to the highest so far, smaller ones first."""
    found = {}
    # Naively 11,000 MB in float32 (the distances of all pairs, four times), 2,000 (512^3, four times) and 1e6.
    for name, b, d in (("rkd_angle", 512, 32), ("rkd_distance", 8192, 16), ("rank_hinge", 1000, 64)):
        student, teacher = inputs(b, d=d, e=d, dtype=torch.float32)
        loss = getattr(losses, name)
        loss(*(x[:9].clone().requires_grad_() for x in (student, teacher))).backward()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        loss(student.requires_grad_(), teacher).backward()
        found[name] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return found


def test_memory(tmp_path: Path) -> None:
    (found,) = processes.run(memory, 1, tmp_path)
    assert found["rkd_angle"] < 60, found
    assert found["rkd_distance"] < 120, found
    assert found["rank_hinge"] < 200, found


COMPILED = """
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from distill.losses import rank_hinge, rkd_angle, rkd_distance

torch.manual_seed(0)
torch.set_num_threads(1)
for loss in (rkd_distance, rkd_angle, rank_hinge):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=counter)
    for b in (7, 12, 64):
        teacher = torch.randn(b, 8)
        student = torch.randn(b, 6).requires_grad_()
        values = loss(student, teacher), compiled(student, teacher)
        gradients = [torch.autograd.grad(value, student)[0] for value in values]
        assert torch.equal(*values) and torch.equal(*gradients)
        first = counter.frame_count if b == 7 else first  # 2 with a margin, which torch first takes for a variable
        assert counter.frame_count == first <= 2, counter.frame_count
"""


def test_compiles_whole_and_once_for_every_size() -> None:
    """In a process of its own: the shape checks of the tests cannot be compiled."""
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("operator", "options"), [(pairs.rkd_distance, ()), (pairs.rkd_angle, (3,)), (order.rank_hinge, (0.1,))]
)
def test_torch_finds_nothing_wrong_with_the_operators(operator: engine.Operator, options: tuple) -> None:
    student, teacher = inputs(5)
    torch.library.opcheck(operator._operator, (student.requires_grad_(), teacher, *options, True))
