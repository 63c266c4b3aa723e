"""What the streamed losses have in common: tiles, graphs, precision, memory, and one process's share of the work."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
import torch.nn.functional as F
from test_losses import CASES, Case, columns, every_loss, gradient, inputs
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from distill import distributed, losses
from distill.losses import cosine_distance, cross_contrastive, cross_kl, gram_kl
from distill.losses.cross import check_temperatures
from distill.streaming import divergence, engine

# How a problem is cut that is too large for memory.
GEOMETRIES = {
    "tiles of 3": [(engine, "TILE", 3)],
    "tiles of 3 by 7": [(engine, "tile_sizes", lambda rows: (3, 7))],
    "nothing kept": [(engine, "KEPT", 0)],
    "small chunks": [
        (divergence, "LEAST_ROWS", 2),
        (divergence, "LARGEST_CHUNK", 40),
        (divergence, "CHUNK", 1),
        (divergence, "BLOCK", 1),
    ],
}


@every_loss
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-5)])
def test_any_geometry_gives_the_same_numbers(
    case: Case, geometry: str, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher = inputs(case, 20, dtype)
    extra = columns(case, 20, n=11, dtype=dtype)
    value, whole = case(student, teacher, **extra), gradient(lambda s: case(s, teacher, **extra), student)
    for module, name, number in GEOMETRIES[geometry]:
        monkeypatch.setattr(module, name, number)
    torch.testing.assert_close(case(student, teacher, **extra), value, rtol=tolerance, atol=tolerance)
    pieces = gradient(lambda s: case(s, teacher, **extra), student)
    assert (pieces - whole).abs().max() <= tolerance * whole.abs().max()


def compile_all() -> None:
    """Every loss as one graph, also of its backward, and none more for a batch of another size."""
    for case in CASES:
        graphs: list[torch.fx.GraphModule] = []

        def backend(graph: torch.fx.GraphModule, example: list[Tensor], graphs: list[Any] = graphs) -> Any:
            graphs.append(graph)
            return torch._dynamo.lookup_backend("aot_eager")(graph, example)

        torch._dynamo.reset()
        compiled = torch.compile(case, fullgraph=True, dynamic=True, backend=backend)
        first = 0
        for b in (16, 9, 5):
            student, teacher = inputs(case, b)
            extra = columns(case, b, n=b + 2)
            torch.testing.assert_close(compiled(student, teacher, **extra), case(student, teacher, **extra))
            found, plain = (gradient(partial(_of_student, loss, teacher, extra), student) for loss in (compiled, case))
            torch.testing.assert_close(found, plain)
            first = first or len(graphs)
            assert len(graphs) == first, f"{case} was compiled again for a batch of {b}"
    print("compiled", len(CASES))


def _of_student(loss: Any, teacher: Tensor, extra: dict[str, Tensor], student: Tensor) -> Tensor:
    return loss(student, teacher, **extra)


def test_a_compiled_loss_is_one_graph_and_a_ragged_batch_needs_no_other() -> None:
    """In a process of its own: the shape checks of the tests cannot be compiled."""
    command = "import torch, test_streaming; torch.manual_seed(0); test_streaming.compile_all()"
    ran = subprocess.run(
        [sys.executable, "-c", command], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=300
    )
    assert f"compiled {len(CASES)}" in ran.stdout, ran.stderr


@every_loss
def test_a_second_derivative_is_refused(case: Case) -> None:
    student, teacher = inputs(case, 5)
    value = case(student.requires_grad_(), teacher)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(value, student, create_graph=True)


@every_loss
@pytest.mark.usefixtures("unchecked")
def test_a_forward_mode_derivative_is_refused(case: Case) -> None:
    student, teacher = inputs(case, 5)
    for derivative in (
        lambda loss: torch.func.jvp(loss, (student,), (student,)),
        lambda loss: torch.func.jacfwd(loss)(student),
    ):
        with pytest.raises(RuntimeError, match="no forward-mode derivative"):
            derivative(lambda rows: case(rows, teacher))


def test_a_student_without_gradient_costs_none() -> None:
    student, teacher = torch.randn(50, 8), torch.randn(50, 8)
    with counted() as count:
        cross_contrastive(student, teacher)
    assert count.flop == 2 * 50 * 50 * 8
    with counted() as count, torch.no_grad():
        cross_contrastive(student.requires_grad_(), teacher)
    assert count.flop == 2 * 50 * 50 * 8
    with counted() as count:
        cross_contrastive(student, teacher)
    assert count.flop == 4 * 50 * 50 * 8


HARD = {
    "contrastive, loss 6e-3": (cross_contrastive, 0.02, 0.01),
    "contrastive, loss 2e-7": (cross_contrastive, 0.01, 0.01),
    "contrastive, far": (cross_contrastive, 0.005, 3.0),
    "kl, near": (cross_kl, 0.02, 1e-4),
    "kl, on the way": (cross_kl, 0.02, 0.3),
    "kl, far": (cross_kl, 0.01, 3.0),
    "gram kl, near": (gram_kl, 0.02, 1e-4),
    "gram kl, far": (gram_kl, 0.02, 3.0),
    "cosine, near": (lambda s, t, temperature: cosine_distance(s, t), 1.0, 1e-4),
}


@pytest.mark.parametrize("name", HARD)
def test_float32_is_exact_to_1e5_where_autograd_is_not(name: str) -> None:
    loss, temperature, noise = HARD[name]
    teacher = F.normalize(2 * torch.randn(256) + torch.randn(96, 256))  # cosines about .8
    student = teacher + noise * torch.randn(96, 256) / 16
    truth = gradient(lambda s: loss(s, teacher.double(), temperature=temperature), student.double())
    ours = gradient(lambda s: loss(s, teacher, temperature=temperature), student)
    assert (ours - truth).norm() <= 1e-5 * truth.norm()


# Differences of the logits that lie around -4 to -14, hence hardly vary: less their mean they are small.
SHIFTED = {
    "kl, a flatter student": (partial(cross_kl, temperature=0.2, teacher_temperature=0.07), 0.0),
    "kl, a much flatter student": (partial(cross_kl, temperature=1.0, teacher_temperature=0.07), 0.0),
    "kl, a student out of the teacher's cone": (partial(cross_kl, temperature=0.05), 4.0),
    "gram kl, a student out of the teacher's cone": (partial(gram_kl, temperature=0.05), 2.0),
}


@pytest.mark.parametrize("name", SHIFTED)
def test_float32_is_exact_where_all_logits_differ_alike(name: str) -> None:
    loss, off = SHIFTED[name]
    centre = torch.randn(1, 64)
    teacher = 3 * centre + torch.randn(64, 64)
    student = teacher - off * centre + 0.3 * torch.randn(64, 64)
    truth = gradient(lambda s: loss(s, teacher.double()), student.double())
    ours = gradient(lambda s: loss(s, teacher), student)
    assert (ours - truth).norm() <= 1e-5 * truth.norm()
    torch.testing.assert_close(
        loss(student, teacher).double(), loss(student.double(), teacher.double()), rtol=1e-5, atol=0
    )


def test_a_divergence_is_never_below_zero() -> None:
    values = [cross_kl(*torch.randn(2, 5, 1), temperature=0.005, teacher_temperature=0.01) for _ in range(300)]
    assert min(values) >= 0


@every_loss
def test_a_matmul_precision_that_somebody_set_does_not_reach_the_losses(case: Case) -> None:
    student, teacher = inputs(case, 64, torch.float32, d=64)
    plain = gradient(lambda s: case(s, teacher), student)
    try:
        torch.set_float32_matmul_precision("medium")
        assert torch.equal(gradient(lambda s: case(s, teacher), student), plain)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("temperature", [0.1, 0.01, 0.001])
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_student_opposite_to_everything_has_a_loss(temperature: float, symmetric: bool) -> None:
    """All cosines near -1: what is e^-200 of the largest possible logit is all there is."""
    teacher = F.normalize(torch.ones(6, 16) + 0.05 * torch.randn(6, 16))
    student = -teacher.flip(0)
    ours = cross_contrastive(student, teacher, temperature=temperature, symmetric=symmetric)
    truth = cross_contrastive(student.double(), teacher.double(), temperature=temperature, symmetric=symmetric)
    assert truth > 0.1
    torch.testing.assert_close(ours.double(), truth, rtol=1e-4, atol=1e-4)
    assert gradient(
        lambda s: cross_contrastive(s, teacher, temperature=temperature, symmetric=symmetric), student
    ).any()


def test_rows_of_any_magnitude_count_alike() -> None:
    student, teacher, bank = (torch.randn(6, 8) for _ in range(3))
    powers = torch.tensor([1e-37, 1e-20, 1.0, 1e10, 1e30, 0.0])[:, None]
    plain = torch.where(powers > 0, student, 0 * student)
    for loss in (cross_contrastive, cross_kl):
        torch.testing.assert_close(loss(student * powers, teacher * 1e25, bank * 1e-25), loss(plain, teacher, bank))


LONG = 3e38 * torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0, 1.0, 1.0, 1.0])


@every_loss
@pytest.mark.parametrize("kept", [True, False])
def test_a_row_whose_length_float32_cannot_hold_counts_as_any_other(
    case: Case, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher = inputs(case, 6, torch.float32)
    student[2] = LONG
    if not kept:
        monkeypatch.setattr(engine, "KEPT", 0)
    shorter = student.clone()
    shorter[2] /= 1e38
    torch.testing.assert_close(case(student, teacher), case(shorter, teacher))
    found, expected = (gradient(lambda rows: case(rows, teacher), rows) for rows in (student, shorter))
    others = torch.arange(6) != 2
    torch.testing.assert_close(found[others], expected[others])


@every_loss
@pytest.mark.parametrize("row", [0.0, 1e-30, 1e30])
def test_a_row_of_any_length_leaves_a_wider_students_digits(case: Case, row: float) -> None:
    student, teacher = inputs(case, 6, torch.float64)
    teacher = teacher.float()
    teacher[3] *= row
    extra = columns(case, 6, dtype=torch.float32)
    wide = {name: value.double() if value.is_floating_point() else value for name, value in extra.items()}
    exact = case(student, teacher.double(), **wide)
    torch.testing.assert_close(case(student, teacher, **extra), exact, rtol=1e-12, atol=1e-13)


def test_a_false_negative_by_the_teachers_own_cosine_is_no_negative() -> None:
    teacher = F.normalize(torch.randn(5, 8, dtype=torch.float64))
    student = torch.randn(5, 8, dtype=torch.float64)
    twin = F.normalize(teacher[:1] + 0.05 * torch.randn(1, 8, dtype=torch.float64))
    stranger = -teacher[:1]
    assert float(teacher[:1] @ twin.T) > 0.95
    for symmetric in (False, True):
        plain = cross_contrastive(student, teacher, stranger, symmetric=symmetric)
        both = cross_contrastive(student, teacher, torch.cat([twin, stranger]), symmetric=symmetric)
        masked = cross_contrastive(
            student[:1], teacher[:1], torch.cat([twin, stranger]), symmetric=symmetric, false_negative_margin=0.1
        )
        without = cross_contrastive(student[:1], teacher[:1], stranger, symmetric=symmetric)
        torch.testing.assert_close(masked, without)
        assert both > plain


def test_a_false_negative_margin_is_of_cosines() -> None:
    with pytest.raises(ValueError, match="between 0 and 2"):
        cross_contrastive(torch.randn(2, 4), torch.randn(2, 4), false_negative_margin=-0.1)


class counted(TorchDispatchMode):
    """Counts the FLOP of matrix products, also inside the losses' operators."""

    def __enter__(self) -> "counted":
        self.flop = 0
        self.inside = _operators_opened()
        self.inside.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.inside.__exit__(*error)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            a, b = args[-2:]
            self.flop += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        return function(*args, **(kwargs or {}))


@contextmanager
def _operators_opened() -> Iterator[None]:
    """An operator of torch hides what it runs: run the functions themselves."""
    call = engine.Operator.__call__

    def direct(self: engine.Operator, student: Tensor, *arguments: Any) -> Tensor:
        wanted = student.requires_grad and torch.is_grad_enabled()
        with torch.no_grad():
            fixed = [argument.detach() if isinstance(argument, Tensor) else argument for argument in arguments]
            return self.compute(student.detach(), *fixed, wanted)[0]

    engine.Operator.__call__ = direct  # type: ignore[method-assign]
    try:
        yield
    finally:
        engine.Operator.__call__ = call  # type: ignore[method-assign]


SHARED = {
    "CosineDistance": losses.CosineDistance,
    "CrossContrastive": losses.CrossContrastive,
    "CrossContrastive, symmetric": lambda: losses.CrossContrastive(symmetric=True),
    "CrossKL": losses.CrossKL,
    "GramMSE": losses.GramMSE,
    "GramKL": losses.GramKL,
}
WORK = {"b": 768, "d": 16}


def flop_and_collectives(rows: int, width: int) -> dict[str, Any]:
    """In one of several processes: for each loss, FLOP of its share, and the collectives of forward and of backward."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(rows, width, generator=generator) for _ in range(2))
    mine = slice(distributed.share(rows).start, distributed.share(rows).stop)
    found = {}
    for name, make in SHARED.items():
        leaf, twins = student[mine].clone().requires_grad_(), teacher[mine]
        with counted() as count:
            distributed.global_loss(make(), leaf, twins)
        forward, value = _collectives(lambda: distributed.global_loss(make(), leaf, twins))  # noqa: B023
        backward, _ = _collectives(value.backward)
        found[name] = {"flop": count.flop, "forward": forward, "backward": backward}
    return found


def _collectives(action: Any) -> tuple[int, Any]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        result = action()
    return sum(event.name.startswith("c10d::") for event in profile.events()), result


@pytest.mark.parametrize("world", [2, 4])
def test_the_work_of_a_process_is_its_share_and_backward_says_nothing(world: int, tmp_path: Path) -> None:
    alone = flop_and_collectives(WORK["b"], WORK["d"])
    assert all(result["forward"] == result["backward"] == 0 for result in alone.values())
    for shares in processes.run(flop_and_collectives, world, tmp_path, rows=WORK["b"], width=WORK["d"]):
        for name, share in shares.items():
            assert share["flop"] <= alone[name]["flop"] / world * 1.05, name
            assert 1 <= share["forward"] <= 10, name  # sizes, rows or moments, sums: none of them counted by rows
            assert share["backward"] == 0, name


MEMORY = """
import resource, sys, torch
from distill import losses
from distill.streaming import divergence
torch.set_num_threads(1)
divergence.LARGEST_CHUNK = 2**22
n, d = 8192, 16
loss = getattr(losses, sys.argv[1])
student, teacher = torch.randn(n, d, requires_grad=True), torch.randn(n, d)
loss(student[:64], teacher[:64]).backward()  # what is loaded once
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
loss(student, teacher).backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.parametrize("name", ["cross_contrastive", "cross_kl", "cross_mse", "gram_kl", "gram_mse", "rkd_distance"])
def test_the_matrix_is_never_in_memory(name: str) -> None:
    """8,192 x 8,192 in float32 is 256 MB; two chunks of a divergence are 32 MB here."""
    ran = subprocess.run([sys.executable, "-c", MEMORY, name], capture_output=True, text=True, check=True, timeout=300)
    assert int(ran.stdout) < 64


@every_loss
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_nan_stays_nan(case: Case, side: str) -> None:
    student, teacher = inputs(case, 8)
    (student if side == "student" else teacher)[3, 2] = torch.nan
    assert case(student, teacher).isnan()


@pytest.mark.usefixtures("unchecked")
def test_a_learned_temperature_is_refused_rather_than_left_without_gradient() -> None:
    temperature: Any = torch.tensor(0.05, requires_grad=True)
    with pytest.raises(TypeError, match="it is not learned"):
        check_temperatures("cross_kl", temperature)
