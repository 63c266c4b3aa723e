"""The Triton kernels against the plain passes, by Triton's interpreter where there is no GPU; and every loss on CUDA."""

import importlib.util
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from types import ModuleType
from typing import Any

import pytest
import torch
from packaging.version import Version
from test_losses import CASES, Case, columns, every_loss, gradient, inputs
from test_streaming import HARD
from torch import Tensor

from distill.benchmark.arms import one_tile
from distill.losses import cross_contrastive
from distill.streaming import divergence, engine, joint, pairs
from distill.streaming.columns import LeftOut

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Widths of one column, within a block, of many blocks and of a power of two; a block has at most 2,048 columns.
SHAPES = [(1, 1), (7, 37), (3, 64), (2, 5000)]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    pytest.importorskip("triton", reason="Triton is not installed")
    if DEVICE == "cpu" and not INTERPRETED:
        pytest.skip("without a GPU only as TRITON_INTERPRET=1 pytest tests/test_kernels.py")
    return importlib.import_module("distill.streaming.kernels")


def test_the_kernels_are_right_by_the_interpreter() -> None:
    """The tests of this file in a process of their own: Triton must know before it is imported, and anything may import it."""
    pytest.importorskip("triton", reason="Triton is not installed")
    if DEVICE == "cuda" or INTERPRETED:
        pytest.skip("the other tests say so themselves")
    triton, numpy = (Version(metadata.version(name)) for name in ("triton", "numpy"))
    if triton < Version("3.7") and numpy >= Version("2.4"):
        pytest.skip("Triton's interpreter before 3.7 calls int() on arrays, which numpy 2.4 refuses")
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "2 skipped" in ran.stdout  # this one, and what is about machines where they do not run


def assert_close(found: Tensor, exact: Tensor, tolerance: float = 1e-6) -> None:
    """To so much of each number, or of the largest of all where it is a difference."""
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double().cpu(), exact, rtol=tolerance, atol=tolerance * float(exact.abs().max()))


def on_device(*tensors: Tensor | None) -> list[Tensor | None]:
    """Copies in float32; integers as they are."""
    return [None if x is None else (x.float() if x.is_floating_point() else x).to(DEVICE, copy=True) for x in tensors]


def left_out_of(shape: tuple[int, int], twin: int, with_keys: bool) -> tuple[LeftOut, dict[str, Any]]:
    """For the plain passes in float64, and as arguments of a kernel."""
    keys = [torch.randint(2**40, 2**40 + 5, (n,)) if with_keys else None for n in shape]
    moved = on_device(*keys)
    return LeftOut(twin, *keys), {"twin": twin, "keys": moved[0], "column_keys": moved[1]}


@every_shape
@pytest.mark.parametrize("twin", [0, -1, 3, -50, 5000])
@pytest.mark.parametrize("with_keys", [False, True])
def test_powers(kernels: ModuleType, shape: tuple[int, int], twin: int, with_keys: bool) -> None:
    logits, before = (10 * torch.randn(shape)).double(), torch.rand(shape[0], 1).double()
    shift = torch.full((shape[0], 1), 4.0).double()
    left_out, arguments = left_out_of(shape, twin, with_keys)
    powers, shifts, total = on_device(logits, shift, before)
    left_out.fill_(logits)
    assert kernels.powers_(powers, shifts, total, **arguments, running=False) is None
    assert_close(powers, (logits - shift).exp())
    assert not powers.cpu()[logits.isinf()].any()
    assert_close(total, before + (logits - shift).exp().sum(-1, keepdim=True))


@every_shape
@pytest.mark.parametrize("with_keys", [False, True])
def test_powers_with_running_maxima(kernels: ModuleType, shape: tuple[int, int], with_keys: bool) -> None:
    logits, before = (60 * torch.rand(shape)).double(), torch.rand(shape[0], 1).double()
    shift = (60 * torch.rand(shape[0], 1)).double()
    left_out, arguments = left_out_of(shape, 1, with_keys)
    powers, shifts, total = on_device(logits, shift, before)
    left_out.fill_(logits)
    shrink = kernels.powers_(powers, shifts, total, **arguments, running=True)
    highest = torch.maximum(shift, logits.amax(-1, keepdim=True))
    tolerance = 1e-5  # a difference of numbers of 60 is rounded by 4e-6
    assert_close(shifts, highest)
    assert_close(shrink, (shift - highest).exp(), tolerance)
    assert_close(powers, (logits - highest).exp(), tolerance)
    assert_close(total, before * (shift - highest).exp() + (logits - highest).exp().sum(-1, keepdim=True), tolerance)


@every_shape
@pytest.mark.parametrize("with_keys", [False, True])
def test_softmaxes_both_ways(kernels: ModuleType, shape: tuple[int, int], with_keys: bool) -> None:
    logits = (3 * torch.randn(shape)).double()
    rows = logits.logsumexp(1, keepdim=True).float().double()
    sums = logits.logsumexp(0)[:, None].float().double()
    left_out, arguments = left_out_of(shape, -1, with_keys)
    found, *moved = on_device(logits, rows, sums)
    left_out.fill_(logits)
    kernels.both_softmaxes_(found, *moved, **arguments)
    assert_close(found, (logits - rows).exp() + (logits - sums.T).exp())
    assert not found.cpu()[logits.isinf()].any()


@every_shape
@pytest.mark.parametrize(("distance", "shift"), [(1e-4, 0.0), (0.1, 0.0), (3.0, 0.0), (0.1, -14.0)])
def test_a_divergence_of_near_rows_far_rows_and_a_row_of_nothing(
    kernels: ModuleType, shape: tuple[int, int], distance: float, shift: float
) -> None:
    logits, delta = ((size * torch.randn(shape)).double() for size in (2.0, distance))
    delta += shift
    near = torch.arange(shape[0])[:, None] % 2 == 0
    logits[:, ::3] = -torch.inf
    logits[-1] = -torch.inf
    mine, change, is_near = on_device(logits, delta, near)
    before = change.clone()
    sums = kernels.divergence_rows(mine, change, is_near, into_delta=False)
    assert torch.equal(change, before)
    assert torch.equal(kernels.divergence_rows(mine, change, is_near, into_delta=True), sums)
    empty = logits.isinf().all(-1, keepdim=True)
    p, q = (x.softmax(-1).masked_fill(empty, 0) for x in (logits, logits + delta))
    teacher, student = (x.logsumexp(-1, keepdim=True).masked_fill(empty, 0) for x in (logits, logits + delta))
    mean = (p * delta).sum(-1, keepdim=True)
    centred = (delta - mean).masked_fill(p == 0, 0)
    w = (p * centred.expm1()).sum(-1, keepdim=True)
    value = (p * (centred.expm1() - centred)).sum(-1, keepdim=True) + w.log1p() - w
    far_value = student - teacher - mean
    assert_close(sums[:, 1:2], teacher)
    found_w = sums[:, 2:].cpu().double()
    # The kernel's mean is off by its rounding, and w with it; the two together are not.
    assert (found_w - w).where(near, 0).abs().max() < 1e-6 * max(distance, abs(shift)) * (1 + w.max())
    found = sums[:, :1].cpu().double() + found_w.log1p() - found_w
    assert_close(sums[:, 2:].where(~is_near, 0), student.where(~near, 0))
    assert_close(found.where(near, 0).float(), value.where(near, 0), 2e-5)
    assert (sums[:, :1].cpu() - far_value).where(~near, 0).abs().max() < 1e-5  # a difference of numbers of about 10
    assert_close(change.where(is_near, 0), (q - p).where(near, 0), 1e-5)  # of the largest q - p, not of 1
    assert (change.cpu() - (q - p)).abs().max() < 1e-6
    assert not change.cpu()[logits.isinf()].any()


@every_shape
def test_differences_of_rows_and_columns(kernels: ModuleType, shape: tuple[int, int]) -> None:
    logits, delta = (5 * torch.randn(shape)).double(), torch.randn(shape).double()
    logits[:, 0] = -torch.inf
    rows, sums = ((10 + torch.rand(size)).double() for size in ((shape[0], 2), (2, shape[1])))
    mine, change, *moved = on_device(logits, delta, rows, sums)
    kernels.both_differences_(mine, change, *moved)
    student = logits + delta
    exact = (student - rows[:, 1:]).exp() - (logits - rows[:, :1]).exp()
    assert_close(change, exact + (student - sums[1:]).exp() - (logits - sums[:1]).exp())


FUSED = {case for case in map(str, CASES) if "_kl" in case or "contrastive" in case}


@pytest.fixture
def fused(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels also for tiles on a CPU, where the interpreter runs them."""
    taken = []

    def fits(tile: Tensor) -> ModuleType | None:
        if tile.dtype != torch.float32 or not tile.is_contiguous():
            return None
        taken.append(tile.shape)
        return kernels

    monkeypatch.setattr(engine, "kernels_for", fits)
    yield
    assert taken


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize("case", [case for case in CASES if str(case) in FUSED], ids=str)
@pytest.mark.parametrize("tile", [5, 1024])
@pytest.mark.parametrize("temperature", [None, 0.005])
def test_losses_through_the_kernels(
    case: Case, tile: int, temperature: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At temperature .005 contrastive sums have running maxima."""
    monkeypatch.setattr(engine, "TILE", tile)

    def loss(*args: Any, **kwargs: Any) -> Tensor:
        return case.loss(
            *args, **kwargs, **(case.options if temperature is None else {**case.options, "temperature": temperature})
        )

    student, teacher = (x.float().double() for x in inputs(case, 12))
    extra = columns(case, 12, n=9)
    exact, truth = loss(student, teacher, **extra), gradient(lambda s: loss(s, teacher, **extra), student)
    rows, twins = on_device(student, teacher)
    moved = dict(zip(extra, on_device(*extra.values()), strict=True))
    tolerance = 2e-5 if temperature is None else 2e-4  # float32 has 6e-8 / temperature of a power
    assert_close(loss(rows, twins, **moved), exact, tolerance)
    assert_close(gradient(lambda s: loss(s, twins, **moved), rows), truth, tolerance)


@pytest.mark.usefixtures("fused")
def test_a_false_negative_margin_through_the_kernels() -> None:
    student, teacher = torch.randn(9, 4).double(), torch.randn(9, 4).double()
    for symmetric in (False, True):
        exact = cross_contrastive(student, teacher, symmetric=symmetric, false_negative_margin=0.5)
        found = cross_contrastive(*on_device(student, teacher), symmetric=symmetric, false_negative_margin=0.5)
        assert_close(found, exact, 1e-5)
        assert not torch.isclose(exact, cross_contrastive(student, teacher, symmetric=symmetric), rtol=1e-3)


@pytest.mark.parametrize(
    ("count", "expected"),
    [(1, (1024, 2**14)), (1024, (1024, 2**14)), (3000, (3000, 11008)), (4096, (4096, 8192)), (2**18, (4096, 8192))],
)
def test_tiles_on_a_device_are_large_and_bounded(count: int, expected: tuple[int, int]) -> None:
    assert engine.sizes_on_device(count) == expected
    with one_tile():
        assert min(engine.sizes_on_device(count)) >= 2**40


def test_where_triton_is_missing_or_cannot_compile_the_passes_are_plain() -> None:
    if DEVICE == "cuda" or INTERPRETED:
        pytest.skip("Triton works here")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert engine._kernels.__wrapped__(torch.device("cpu")) is None
    told = any("Triton is installed but does not work here" in str(warning.message) for warning in caught)
    assert told == (importlib.util.find_spec("triton") is not None)


def test_a_cpu_has_square_tiles_and_no_kernels() -> None:
    assert engine.tile_sizes(torch.empty(3, 4)) == (engine.TILE, engine.TILE)
    assert engine.kernels_for(torch.empty(3, 4)) is None


# What follows needs a GPU: pytest -m gpu.
needs_cuda = pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")


@pytest.fixture(params=["fused", "plain"])
def passes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "plain":
        monkeypatch.setattr(engine, "kernels_for", lambda tile: None)
    else:
        pytest.importorskip("triton", reason="Triton is not installed")


@contextmanager
def no_synchronisation() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def on_cuda(extra: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.cuda() for name, value in extra.items()}


@pytest.mark.gpu
@needs_cuda
@pytest.mark.usefixtures("passes")
@every_loss
@pytest.mark.parametrize("b", [1, 7, 300, 3000])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_cuda_gives_the_numbers_of_the_cpu(case: Case, b: int, dtype: torch.dtype) -> None:
    if b == 3000 and case.function in ("rank_hinge", "rkd_angle"):
        pytest.skip("half a minute on the CPU")
    student, teacher = inputs(case, b, dtype, d=32)
    extra = columns(case, b, n=11, dtype=dtype, d=32)
    wide = {k: v.double() if v.is_floating_point() else v for k, v in extra.items()}
    exact = case(student.double(), teacher.double(), **wide)
    truth = gradient(lambda s: case(s, teacher.double(), **wide), student.double())
    rows, twins, moved = student.cuda(), teacher.cuda(), on_cuda(extra)
    tolerance = 1e-10 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close(case(rows, twins, **moved).double().cpu(), exact, rtol=tolerance, atol=tolerance)
    found = gradient(lambda s: case(s, twins, **moved), rows).double().cpu()
    rounding = 0 if dtype == torch.float64 else torch.finfo(dtype).eps
    smallest = max(torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps, tolerance * 1e-4)
    assert ((found - truth).abs() <= rounding * truth.abs() + tolerance * truth.abs().max() + smallest).all()


@pytest.mark.gpu
@needs_cuda
@pytest.mark.usefixtures("passes")
@every_loss
def test_the_host_never_waits_for_cuda(case: Case) -> None:
    student, teacher = (x.cuda() for x in inputs(case, 300, torch.float32))
    extra = on_cuda(columns(case, 300, n=11, dtype=torch.float32))
    student.requires_grad_()
    case(student, teacher, **extra).backward()  # what is compiled and allocated once
    with no_synchronisation():
        case(student, teacher, **extra).backward()
    with pytest.raises(RuntimeError, match="synchroniz"), no_synchronisation():
        case(student, teacher, **extra).item()


@pytest.mark.gpu
@needs_cuda
@pytest.mark.usefixtures("passes")
@pytest.mark.parametrize("name", [name for name in HARD if name != "gram kl, near"])
def test_float32_on_cuda_is_exact_to_1e5(name: str) -> None:
    """But for gram_kl next to the teacher: which rows are near is not asked on CUDA."""
    loss, temperature, noise = HARD[name]
    teacher = torch.nn.functional.normalize(2 * torch.randn(256) + torch.randn(96, 256))
    student = teacher + noise * torch.randn(96, 256) / 16
    truth = gradient(lambda s: loss(s, teacher.double(), temperature=temperature), student.double())
    ours = gradient(lambda s: loss(s, teacher.cuda(), temperature=temperature), student.cuda()).cpu()
    assert (ours - truth).norm() <= 1e-5 * truth.norm()


@pytest.mark.gpu
@needs_cuda
@pytest.mark.usefixtures("passes")
@every_loss
def test_small_passes_tiles_and_blocks_on_cuda_change_nothing(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = (x.cuda() for x in inputs(case, 300, torch.float32, d=32))
    extra = on_cuda(columns(case, 300, n=11, dtype=torch.float32, d=32))
    whole = [case(student, teacher, **extra), gradient(lambda s: case(s, teacher, **extra), student)]
    sizes = {"TILE": 64, "CUDA_HEIGHT": 64, "CUDA_WIDTH": 64, "CUDA_PASS": 32 * 50, "CUDA_KEPT": 0}
    sizes |= {"CUDA_ROWS": 64, "CUDA_BLOCK": 20, "CUDA_SIDE": 64, "CUDA_CHUNK": 64 * 300}
    for name, size in sizes.items():
        for module in (engine, joint, pairs, divergence):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, size)
    for found, expected in zip(
        [case(student, teacher, **extra), gradient(lambda s: case(s, teacher, **extra), student)], whole, strict=True
    ):
        assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()


@pytest.mark.gpu
@needs_cuda
@pytest.mark.usefixtures("passes")
@pytest.mark.parametrize("temperature", [0.05, 0.005])
@pytest.mark.parametrize("symmetric", [False, True])
def test_many_tiles_on_cuda(temperature: float, symmetric: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 256 rows, where the device would have one."""

    def small(rows: Tensor) -> tuple[int, int]:
        return 256, 512

    student, teacher = torch.randn(1000, 64).cuda(), torch.randn(1000, 64).cuda()
    keys = torch.randint(900, (1000,)).cuda()
    whole = _with_gradient(student, teacher, keys, temperature, symmetric)
    monkeypatch.setattr(engine, "tile_sizes", small)
    tolerance = 5e-7 / temperature
    for found, expected in zip(_with_gradient(student, teacher, keys, temperature, symmetric), whole, strict=True):
        assert (found - expected).abs().max() <= tolerance * expected.abs().max()


def _with_gradient(student: Tensor, teacher: Tensor, keys: Tensor, temperature: float, symmetric: bool) -> list[Tensor]:
    loss: Callable[[Tensor], Tensor] = lambda rows: cross_contrastive(  # noqa: E731
        rows, teacher, keys=keys, temperature=temperature, symmetric=symmetric
    )
    return [loss(student), gradient(loss, student)]
