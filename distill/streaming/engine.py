"""What every streamed loss shares: rows that are normalised tile by tile, other processes' rows, and the operator.

A loss's algorithm is a function of tensors and numbers that returns its value and the gradient of its own student rows.
`operator` registers it with torch: autograd's backward is then one product by a scalar, and torch.compile sees one node.
"""

import functools
import math
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # before any group is: see below
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from distill.similarity import normalize, row_lengths

# torch imports torch.distributed.nn.functional at the first call of an operator, and its defaults are the group of that time.
# A group that is held outlives destroy_process_group, and gloo's threads the interpreter: one that drops a tensor then aborts
# (SIGABRT, "terminate called without an active exception"; torch's issue 190489). Imported before, they hold none.

# Rows and columns of a tile of the matrix. On two cores of an EPYC (1 MB of L2 each) the two products of a contrastive loss
# in tiles of (1024, 1024) took 2 % longer than the whole products, (512, 4096) 8 %, (128, 4096) 30 %. On CUDA: at least.
TILE = 1024
# On CUDA, rows of a tile, its columns, and its elements (128 MB in float32), at most. On an H100 a contrastive loss of
# 16,384 rows took, as of its two products by torch.mm, 1.18 in tiles of (4096, 8192), 1.20 of (16384, 1024), 1.24 of
# (4096, 7168), 1.29 of (4096, 2048), and 1.23 of (5632, 1536), which stay in its L2 cache.
CUDA_HEIGHT, CUDA_WIDTH, CUDA_TILE = 2**12, 2**14, 2**25
# Elements of rows that are normalised once and kept (128 MB in float32); more are normalised a tile at a time. On CUDA
# half of that, for each of student, teacher and bank.
KEPT = 2**25
CUDA_KEPT = 2**24
# Rows whose float64 copies stay in a CPU's cache between passes: whole tiles of them took 3 times as long.
PASS = 128
# Elements that a pass over rows takes at once on CUDA, where a launch costs more than the cache gains.
CUDA_PASS = 2**23


class Operator:
    """A loss as an operator of torch, distill::NAME: called, it gives the value, and the gradient is ready by then."""

    def __init__(self, compute: Callable[..., tuple[Tensor, Tensor]]) -> None:
        self.compute = _with_its_share(_in_full_precision(compute))
        self._operator = torch.library.custom_op(f"distill::{compute.__name__}", self.compute, mutates_args=())
        self._operator.register_fake(_shapes)
        self._operator.register_autograd(_backward, setup_context=_save)

    def __call__(self, student: Float[Tensor, "b d"], *arguments: Any) -> Float[Tensor, ""]:
        if not torch.compiler.is_compiling() and unpack_dual(student).tangent is not None:
            raise RuntimeError("distill's losses have no forward-mode derivative, jvp or jacfwd. Take backward's.")
        with_gradient = student.requires_grad and torch.is_grad_enabled()
        fixed = [argument.detach() if isinstance(argument, Tensor) else argument for argument in arguments]
        return self._operator(student, *fixed, with_gradient)[0]


def operator(compute: Callable[..., tuple[Tensor, Tensor]]) -> Operator:
    """Make an operator of `compute(student, *arguments, with_gradient: bool) -> (value, gradient)`.

    `value` is a scalar; `gradient` is that of the rows of `student` as they came in, or has 0 rows if it was not asked
    for. Both are float32, float64 where the student is. Only the student gets a gradient, and that has none itself:
    a second derivative raises RuntimeError, and so does forward mode.
    """
    return Operator(compute)


def _with_its_share(compute: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """Which share is in force is asked when the operator runs: torch.compile, which traces the call, guards no such thing."""

    @functools.wraps(compute)
    def run(student: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        *rest, with_gradient = arguments
        shared = _in_force.share is not None
        if not shared and not len(student):
            raise ValueError("a loss is a mean over rows, got a student of none. Give it at least one row.")
        # In a shared batch another process's rows may want a gradient: all enter its collectives, or all wait.
        value, gradient = compute(student, *rest, shared or with_gradient)
        return value, gradient if with_gradient else gradient.new_empty((0, student.shape[1]))

    return run


def _in_full_precision(compute: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    @functools.wraps(compute)
    def run(student: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        with torch.autocast(student.device.type, enabled=False), _without_rounding():  # it would multiply in 16 bits
            return compute(student, *arguments)

    return run


@contextmanager
def _without_rounding() -> Iterator[None]:
    """Products of float32 in float32: at temperature .02 a cosine in TF32 puts a logit off by .02, in bf16 by .2."""
    backends: list[Any] = [getattr(backend, "matmul", None) for backend in (torch.backends.cuda, torch.backends.mkldnn)]
    precisions = [(backend, getattr(backend, "fp32_precision", "none")) for backend in backends]  # since torch 2.9
    rounding = [(backend, precision) for backend, precision in precisions if precision not in ("none", "ieee")]
    for backend, _ in rounding:
        backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        for backend, precision in rounding:
            backend.fp32_precision = precision


def _shapes(student: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    *_, with_gradient = arguments
    dtype = working_dtype(student)
    rows = student.shape[0] if with_gradient else 0
    return student.new_empty((), dtype=dtype), student.new_empty((rows, student.shape[1]), dtype=dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)  # or backward would get zeros of the size of the gradient, for the gradient
    ctx.save_for_backward(output[1])
    ctx.dtype, ctx.inputs = inputs[0].dtype, len(inputs)


def _backward(ctx: Any, value_gradient: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if value_gradient is None:
        return (None,) * ctx.inputs
    if torch.is_grad_enabled():
        raise RuntimeError(
            "distill's losses compute their gradient in the forward pass: they have no second derivative."
        )
    (gradient,) = ctx.saved_tensors
    # The product is float32 and only then rounded: under a GradScaler the unscaled gradient may be too small for float16.
    return (gradient * value_gradient).to(ctx.dtype), *[None] * (ctx.inputs - 1)


def working_dtype(rows: Tensor) -> torch.dtype:
    """Of norms, cosines and sums: float32, or float64 where the rows are."""
    return torch.float64 if rows.dtype == torch.float64 else torch.float32


def exact_dtype(rows: Tensor) -> torch.dtype:
    """float64, which only MPS lacks."""
    return torch.float32 if rows.device.type == "mps" else torch.float64


class UnitRows:
    """The rows of a matrix at length 1 in the working dtype, without a copy of the whole where it is large."""

    def __init__(self, raw: Shaped[Tensor, "n d"], dtype: torch.dtype) -> None:
        self.raw, self.dtype = raw, dtype
        self._unit: Tensor | None = None
        if raw.numel() <= KEPT and not raw.is_cuda:
            self._inverse, self._unit = _unit_rows(raw, dtype)
            return
        parts = [_inverse_lengths(raw[start:stop], dtype) for start, stop in self.tiles()]
        self._inverse = torch.cat([raw.new_empty((0, 1), dtype=dtype), *parts])
        if raw.is_cuda and raw.numel() <= CUDA_KEPT:
            self._unit = _scaled(raw, self._inverse, dtype)

    def __len__(self) -> int:
        return len(self.raw)

    def tile(self, start: int, stop: int) -> Float[Tensor, "t d"]:
        """Rows start:stop."""
        if self._unit is not None:
            return self._unit[start:stop]
        return _scaled(self.raw[start:stop], self._inverse[start:stop], self.dtype)

    def minus(
        self, other: "UnitRows", start: int, stop: int, factor: float = 1.0, other_factor: float = 1.0
    ) -> Float[Tensor, "t d"]:
        """Rows start:stop times a factor minus the other's times another, exact to the last digits also where they nearly agree.

        Unit rows in float32 differ from true ones by 6e-8, which is 6e-4 of a difference of 1e-4: hence float64 inside.
        """
        out = self.raw.new_empty((stop - start, self.raw.shape[1]), dtype=self.dtype)
        for first, last in tiles(stop - start, pass_rows(self.raw)):
            mine = self._in_float64(start + first, start + last, factor)
            out[first:last] = mine.sub_(other._in_float64(start + first, start + last, other_factor))
        return out

    def _in_float64(self, start: int, stop: int, factor: float) -> Float[Tensor, "t d"]:
        if self.dtype == torch.float64:
            return self.tile(start, stop) * factor
        rows = self.raw[start:stop].to(
            exact_dtype(self.raw), copy=True
        )  # squares of float32 neither vanish nor overflow
        lengths = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
        return rows.mul_((factor / lengths).masked_fill_(self._inverse[start:stop] == 0, 0.0))

    def tiles(self, size: int | None = None) -> Iterator[tuple[int, int]]:
        """The bounds of tiles of at most `size` rows; those of a pass on CUDA, and TILE elsewhere, if it is not given."""
        return tiles(len(self), (pass_rows(self.raw) if self.raw.is_cuda else TILE) if size is None else size)

    def through_norms(self, gradient: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """In place, from the gradient of the unit rows to that of the raw rows: (g - (g . s) s) / |z|; 0 for a zero row."""
        for start, stop in self.tiles():
            unit, part = self.tile(start, stop), gradient[start:stop]
            part.addcmul_(unit, (part * unit).sum(-1, keepdim=True), value=-1).mul_(self._inverse[start:stop])
        return gradient


def _unit_rows(raw: Shaped[Tensor, "n d"], dtype: torch.dtype) -> tuple[Float[Tensor, "n 1"], Float[Tensor, "n d"]]:
    """1 / length of each row, 0 for a zero row, and the unit rows; not on CUDA."""
    inverse = _inverse_lengths(raw, dtype)
    if _are_ordinary(inverse):
        return inverse, _scaled(raw, inverse, dtype)
    return inverse, normalize(raw.to(torch.promote_types(raw.dtype, dtype))).to(dtype)


def _inverse_lengths(raw: Shaped[Tensor, "n d"], dtype: torch.dtype) -> Float[Tensor, "n 1"]:
    """0 for a zero row; on CUDA float64, where neither the squares nor the lengths of float32 vanish or overflow.

    Elsewhere rows where they do are measured again, at ten times the cost; on CUDA, looking for them would wait for the device.
    """
    if raw.is_cuda and raw.dtype != torch.float64:
        lengths = torch.linalg.vector_norm(raw.float(), dim=-1, keepdim=True, dtype=torch.float64)
        return lengths.masked_fill(lengths < torch.finfo(torch.float32).tiny, torch.inf).reciprocal()
    rows = raw.to(dtype)
    if not raw.is_cuda:
        inverse = torch.linalg.vector_norm(rows, dim=-1, keepdim=True).reciprocal_()
        if _are_ordinary(inverse):
            return inverse
    lengths = row_lengths(raw.to(exact_dtype(raw)))
    return reciprocal(lengths.masked_fill(lengths < torch.finfo(working_dtype(raw)).tiny, 0.0))


def reciprocal(values: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """0 at 0."""
    return values.masked_fill(values == 0, torch.inf).reciprocal_()


def _scaled(raw: Shaped[Tensor, "n d"], factors: Float[Tensor, "n 1"], dtype: torch.dtype) -> Float[Tensor, "n d"]:
    """Rows times their factors. On CUDA the product is float64 where a factor is, and rounded once, in one kernel."""
    if raw.is_cuda:
        return torch.mul(raw, factors, out=raw.new_empty(raw.shape, dtype=dtype))
    return (raw.to(dtype) * factors).to(dtype)


def _are_ordinary(inverse: Float[Tensor, "n 1"]) -> bool:
    return bool(((inverse > 1e-15) & (inverse < 1e15)).all())


def tiles(count: int, size: int | None = None) -> Iterator[tuple[int, int]]:
    """The bounds (start, stop) of tiles of at most `size` of `count` rows; TILE if it is not given."""
    size = TILE if size is None else size
    return ((start, min(start + size, count)) for start in range(0, count, size))


def pass_rows(rows: Shaped[Tensor, "b d"]) -> int:
    """How many rows a pass with float64 copies takes at once."""
    return max(1, CUDA_PASS // max(1, rows.shape[1])) if rows.is_cuda else PASS


def tile_sizes(rows: Shaped[Tensor, "b d"]) -> tuple[int, int]:
    """Rows and columns of a tile of the matrix of these rows; TILE both ways but on CUDA."""
    return sizes_on_device(len(rows)) if rows.is_cuda else (TILE, TILE)


def sizes_on_device(count: int) -> tuple[int, int]:
    """Large products for any device, in bounded memory: fewer rows have more columns, which are copied at length 1."""
    height = max(TILE, min(count, CUDA_HEIGHT))
    width = min(CUDA_WIDTH, CUDA_TILE // height // 256 * 256)  # rows of an odd length are slow to multiply
    return height, max(TILE, width)


def product_columns(rows: Shaped[Tensor, "n d"]) -> int:
    """How many columns a product of a chunk's few rows takes at once; their copies at length 1 take 50 MB at width 768."""
    return CUDA_WIDTH if rows.is_cuda else TILE


def kernels_for(tile: Float[Tensor, "b n"]) -> ModuleType | None:
    """`distill.streaming.kernels`, fused passes over a tile: for float32 on CUDA where Triton works. None: the plain passes."""
    fits = tile.is_cuda and tile.dtype == torch.float32 and tile.is_contiguous()
    return _kernels(tile.device) if fits else None


@functools.cache
def _kernels(device: torch.device) -> ModuleType | None:
    try:
        from distill.streaming import kernels
    except ImportError:
        return None
    try:
        kernels.check(device)
    except Exception as error:  # whatever a compiler says: images without one are common
        warnings.warn(f"Triton is installed but does not work here, the losses go without it: {error!r}", stacklevel=2)
        return None
    return kernels


def exp_(x: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """exp in place, and 0 below e^-80 (e^-700 in float64).

    On a CPU, torch takes 8 to 20 ns for the exp of a number below -87, and 0.7 for one above.
    """
    if x.is_cuda:
        return x.exp_()
    lowest = -700.0 if x.dtype == torch.float64 else -80.0
    return torch.threshold_(x.clamp_(min=lowest).exp_(), math.exp(lowest + 0.1), 0.0)


class Buffer:
    """One piece of memory for tile after tile, made when the first asks for it: a fresh one would cost its page faults each time."""

    def __init__(self, elements: int, like: Tensor, dtype: torch.dtype) -> None:
        self._elements, self._like, self._dtype = elements, like, dtype
        self._memory: Tensor | None = None

    def __call__(self, *shape: int) -> Tensor:
        if self._memory is None:
            self._memory = self._like.new_empty(self._elements, dtype=self._dtype)
        return self._memory[: int(torch.Size(shape).numel())].view(shape)

    def free(self) -> None:
        """Give the memory back; what was made of it must be done with."""
        self._memory = None


class Share:
    """The rows of a batch that this process holds, and the way to the others'. A process alone holds all."""

    def __init__(self, sizes: Sequence[int], rank: int) -> None:
        self.sizes, self.rank = tuple(sizes), rank
        self.start, self.total = sum(sizes[:rank]), sum(sizes)

    def everyone(self, rows: Shaped[Tensor, "b *d"]) -> Shaped[Tensor, "g *d"]:
        """The rows of all processes in rank order, without gradient. One all-gather, padded to the largest."""
        if len(self.sizes) == 1:
            return rows.detach()
        return gather_rows(rows, self.sizes)

    def everyones(self, rows: UnitRows) -> UnitRows:
        """The same, of unit rows; a process alone has them."""
        return rows if len(self.sizes) == 1 else UnitRows(self.everyone(rows.raw), rows.dtype)

    def max(self, values: Shaped[Tensor, "*any"]) -> Shaped[Tensor, "*any"]:
        """The largest over processes, in place. One all-reduce."""
        if len(self.sizes) > 1:
            dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return values

    def sum(self, values: Shaped[Tensor, "*any"]) -> Shaped[Tensor, "*any"]:
        """The sum over processes, in place. One all-reduce."""
        if len(self.sizes) > 1:
            dist.all_reduce(values)
        return values


def gather_rows(rows: Shaped[Tensor, "b *d"], sizes: Sequence[int]) -> Shaped[Tensor, "g *d"]:
    """Rows of all processes in rank order, without gradient, from as many of each as `sizes` says."""
    padded = rows.new_zeros((max(sizes), *rows.shape[1:]))
    padded[: len(rows)] = rows.detach()
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


class _InForce(threading.local):
    """The share that losses of this thread take their rows for."""

    share: Share | None = None


_in_force = _InForce()


@contextmanager
def sharing(share: Share) -> Iterator[None]:
    """Losses called inside take their rows for one process's share, and give the value and gradient of the whole batch."""
    before, _in_force.share = _in_force.share, share
    try:
        yield
    finally:
        _in_force.share = before


def share_of(rows: Tensor) -> Share:
    """What an operator works with: the share in force, or all rows."""
    share = _in_force.share
    if share is None:
        return Share([len(rows)], 0)
    if len(rows) != share.sizes[share.rank]:
        raise ValueError(
            f"a loss got {len(rows)} rows of a batch of which this process holds {share.sizes[share.rank]}. A loss that "
            "chooses among the rows cannot work on a share: leave out its `runs_on_shares`."
        )
    return share
