"""Unit rows of student and teacher side by side, [S | T] or [S | S - T], a tile at a time, and their moments: [S | T]^T [S | T].

Rows are divided by their lengths in float64 and rounded once, so that S - T keeps its digits where they nearly agree:
unit rows in float32 differ from true ones by 6e-8, which is 6e-5 of a difference of 1e-3.
"""

from collections.abc import Iterable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from distill.similarity import row_lengths
from distill.streaming import engine
from distill.streaming.engine import Buffer, Share, exact_dtype, pass_rows, tiles, working_dtype

# Columns of a block of the moments, of which only those on and above the diagonal are multiplied. At width 2 * 768 on one
# core of an EPYC, against the whole product: blocks of 768 take .76 of its time, 512 .68, 256 .61, 192 .61.
BLOCK = 256
# On CUDA, where products that small leave most of the device idle; and rows of a tile there.
CUDA_BLOCK, CUDA_ROWS = 512, 8192
# How many tiles are summed in float32 before they go to a float64 total: 400 of them put a cross_mse of width 8 off by 9e-5, and
# each of its own would cost 6 % of the products of width 768.
PART = 16


class LazyUnitRows:
    """The rows of a matrix at length 1. No copy but of a tile; zero rows stay zero."""

    def __init__(self, raw: Float[Tensor, "n d"]) -> None:
        self.raw = raw
        lengths = _lengths(raw)
        self.inverse = lengths.masked_fill(lengths < torch.finfo(working_dtype(raw)).tiny, torch.inf).reciprocal()

    def __len__(self) -> int:
        return len(self.raw)

    def write(self, out: Float[Tensor, "t d"], start: int, stop: int) -> None:
        """Rows start:stop into `out`."""
        if out.is_cuda:  # one kernel, which multiplies in float64
            torch.mul(self.raw[start:stop], self.inverse[start:stop], out=out)
        else:
            out.copy_(self.raw[start:stop]).mul_(self.inverse[start:stop].to(out.dtype))

    def write_difference(self, out: Float[Tensor, "t d"], other: "LazyUnitRows", start: int, stop: int) -> None:
        """Rows start:stop less those of the other into `out`."""
        for first, last in tiles(stop - start, pass_rows(self.raw)):
            rows, dtype = slice(start + first, start + last), self.inverse.dtype
            mine = self.raw[rows].to(dtype, copy=True).mul_(self.inverse[rows])
            out[first:last] = mine.addcmul_(other.raw[rows].to(dtype), other.inverse[rows], value=-1)

    def tiles(self, dtype: torch.dtype) -> Iterator[Float[Tensor, "t d"]]:
        """Tile after tile, each in a buffer that the next overwrites."""
        buffer = new_buffer(self.raw, self.raw.shape[1], dtype)
        for start, stop in row_tiles(self.raw):
            tile = buffer(stop - start, self.raw.shape[1])
            self.write(tile, start, stop)
            yield tile


class Joint:
    """Student and teacher rows of one process's share, side by side, and the gradient of the student's."""

    def __init__(
        self,
        share: Share,
        student: Float[Tensor, "b d"],
        teacher: Float[Tensor, "b e"],
        dtype: torch.dtype,
        *,
        difference: bool = False,
    ) -> None:
        self.share, self.dtype, self.width = share, dtype, student.shape[1]
        self.student, self.teacher = LazyUnitRows(student), LazyUnitRows(teacher)
        self._difference, self._both = difference, student.shape[1] + teacher.shape[1]

    def tiles(self) -> Iterator[tuple[slice, Float[Tensor, "t both"]]]:
        """Where the rows stand among this process's own, and [S | T] of them, in a buffer that the next tile overwrites."""
        buffer = new_buffer(self.student.raw, self._both, self.dtype)
        for start, stop in row_tiles(self.student.raw):
            tile = buffer(stop - start, self._both)
            self._write(tile, start, stop)
            yield slice(start, stop), tile

    def whole(self) -> Float[Tensor, "b both"]:
        """One tile of all rows."""
        tile = self.student.raw.new_empty((len(self.student), self._both), dtype=self.dtype)
        self._write(tile, 0, len(tile))
        return tile

    def moments(self) -> Float[Tensor, "both both"]:
        """Over the rows of all processes. Half of a product of (both, b, both)."""
        total = sum_of_moments(self.student.raw, self._both, (tile for _, tile in self.tiles()), self.dtype)
        return mirrored(self.share.sum(total)).to(self.dtype)

    def means(self) -> Float[Tensor, " both"]:
        """Over the rows of all processes."""
        total = self.student.raw.new_zeros(self._both, dtype=self.dtype)
        for _, tile in self.tiles():
            total += tile.sum(0)
        return self.share.sum(total) / self.share.total

    def new_gradient(self, wanted: bool) -> Float[Tensor, "b d"]:
        """Zeros; no rows if it is not wanted."""
        raw = self.student.raw
        return raw.new_zeros((len(raw) if wanted else 0, self.width), dtype=working_dtype(raw))

    def add(
        self,
        gradient: Float[Tensor, "b d"],
        rows: slice,
        unit: Float[Tensor, "t d"],
        piece: Float[Tensor, "t d"],
        factor: float,
    ) -> None:
        """Add the gradient `factor * piece` of unit rows as that of the raw rows, (g - (g . s) s) / |z|; 0 for a zero row.

        `piece` is overwritten.
        """
        piece.addcmul_(unit, (piece * unit).sum(-1, keepdim=True), value=-1)
        gradient[rows] += piece.mul_(self.student.inverse[rows].to(piece.dtype) * factor)

    def add_products(
        self,
        gradient: Float[Tensor, "b d"],
        coefficients: Float[Tensor, "both d"],
        factor: float,
        offset: Float[Tensor, " d"] | None = None,
    ) -> None:
        """The gradient of the unit rows is factor * ([S | T] @ coefficients - offset)."""
        buffer = new_buffer(self.student.raw, self.width, self.dtype)
        for rows, tile in self.tiles():
            piece = torch.mm(tile, coefficients, out=buffer(len(tile), self.width))
            self.add(gradient, rows, tile[:, : self.width], piece if offset is None else piece.sub_(offset), factor)

    def _write(self, tile: Float[Tensor, "t both"], start: int, stop: int) -> None:
        self.student.write(tile[:, : self.width], start, stop)
        if self._difference:
            self.student.write_difference(tile[:, self.width :], self.teacher, start, stop)
        else:
            self.teacher.write(tile[:, self.width :], start, stop)


def sum_of_moments(
    like: Tensor, width: int, some: Iterable[Float[Tensor, "t d"]], dtype: torch.dtype
) -> Float[Tensor, "d d"]:
    """The sum of tile^T tile over tiles of this width and dtype, in float64; see `mirrored`."""
    total = like.new_zeros((width, width), dtype=exact_dtype(like))
    part = like.new_zeros((width, width), dtype=dtype)
    for number, tile in enumerate(some, 1):
        _add_moments(part, tile)
        if number % PART == 0:
            total += part
            part.zero_()
    return total.add_(part)


def _add_moments(total: Float[Tensor, "d d"], tile: Float[Tensor, "t d"]) -> None:
    """Add tile^T tile, in place, in the blocks on and above the diagonal."""
    for start, stop in tiles(len(total), _block(total)):
        total[start:stop, start:].addmm_(tile[:, start:stop].T, tile[:, start:])


def mirrored(total: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    """The symmetric matrix of which only the blocks on and above the diagonal are right, in place."""
    for start, stop in tiles(len(total), _block(total)):
        total[stop:, start:stop] = total[start:stop, stop:].T
    return total


def _block(total: Float[Tensor, "d d"]) -> int:
    return CUDA_BLOCK if total.is_cuda else BLOCK


def row_tiles(rows: Float[Tensor, "n d"]) -> Iterator[tuple[int, int]]:
    """The bounds of tiles of rows; larger ones on CUDA, whose products wait for enough of them."""
    return tiles(len(rows), CUDA_ROWS if rows.is_cuda else engine.TILE)


def new_buffer(like: Tensor, width: int, dtype: torch.dtype) -> Buffer:
    """For a tile of rows of this width."""
    return Buffer(next(stop for _, stop in row_tiles(like)) * width if len(like) else 0, like, dtype)


def moment_dtype(rows: Tensor) -> torch.dtype:
    """Of moments that lose no digits: float32 on the CPU, where it is twice as fast.

    On CUDA float64, which an A100 or H100 multiplies as fast as float32: float32 there may be TF32, and the switch is global.
    """
    return working_dtype(rows) if rows.device.type in ("cpu", "mps") else torch.float64


def _lengths(raw: Float[Tensor, "n d"]) -> Float[Tensor, "n 1"]:
    """In float64, where the squares of float32 neither vanish nor overflow."""
    dtype = exact_dtype(raw)
    if raw.dtype == dtype:
        return row_lengths(raw)
    lengths = raw.new_empty((len(raw), 1), dtype=dtype)
    for start, stop in tiles(len(raw), pass_rows(raw)):
        lengths[start:stop] = torch.linalg.vector_norm(raw[start:stop].to(dtype), dim=-1, keepdim=True)
    return lengths
