"""InfoNCE over the student x teacher matrix, one tile at a time.

With E_ij = exp(l_ij - shift) over the negatives of row i and Z_i their sum, the loss of a row is log(1 + Z_i / E_ii), and
its gradient (sum_j E_ij b_j - Z_i t_i) / (E_ii + Z_i) / temperature. The positive stays out of both sums: p - 1 in float32
loses its digits once the loss is small. "Excess" below is log Z_i - l_ii: the loss is softplus(excess).
"""

from collections.abc import Iterator

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from distill.streaming import engine
from distill.streaming.columns import Columns, LeftOut, Tile
from distill.streaming.engine import Buffer, Share, UnitRows, exp_, operator, share_of, working_dtype

# Where all logits lie in a range of 148, which is so for temperatures from .0136 up, one shift serves every row: all
# powers lie between e^-78 and e^70, and so do a million of them in sum. Below, each row has its running maximum.
WIDEST_RANGE, HEADROOM = 148.0, 70.0


@operator
def cross_contrastive(
    student: Tensor,
    teacher: Tensor,
    bank: Tensor | None,
    keys: Tensor | None,
    bank_keys: Tensor | None,
    temperature: float,
    false_negative_margin: float | None,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Each student row finds its twin among all columns. 2 products of (b, n, d); 1 without gradient, one more with a margin."""
    share = share_of(student)
    matrix = _Matrix(share, student, teacher, bank, keys, bank_keys, temperature, false_negative_margin)
    gradient = matrix.new_gradient(with_gradient)
    sums = _row_sums(matrix, gradient if with_gradient else None)
    excess = sums.excess()
    value = matrix.mean(softplus(excess))
    if with_gradient:
        gradient *= (sums.shift - sums.positives - softplus(excess)).exp()
        matrix.finish(gradient, excess.sigmoid())
    return value, gradient


def _row_sums(matrix: "_Matrix", gradient: Float[Tensor, "b d"] | None) -> "_Sums":
    """Of the own rows over all columns. Powers times columns are added to the gradient, at the rows' shifts."""
    sums = _Sums(matrix.positives, matrix.temperature)
    for tile in matrix.column_tiles():
        for rows in matrix.row_tiles():
            powers, left_out = matrix.logits(rows, tile)
            shrink = sums.add(rows, powers, left_out)
            if gradient is not None:
                if shrink is not None:
                    gradient[rows] *= shrink
                gradient[rows].addmm_(powers, tile.rows)
    return sums


@operator
def cross_contrastive_both_ways(
    student: Tensor,
    teacher: Tensor,
    bank: Tensor | None,
    keys: Tensor | None,
    bank_keys: Tensor | None,
    temperature: float,
    false_negative_margin: float | None,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """The mean of the above and its mirror: each teacher row of the batch finds its student among all student rows.

    3 products of (b, g, d), since the sums of whole columns are known only after the first, and 2 with the bank.
    """
    share = share_of(student)
    matrix = _Matrix(share, student, teacher, bank, keys, bank_keys, temperature, false_negative_margin)
    gradient = matrix.new_gradient(with_gradient)
    rows, columns = _both_sums(matrix, gradient if with_gradient else None)
    excess, everyones = rows.excess(), columns.excess()
    own = everyones[share.start : share.start + len(student)]
    value = matrix.mean(softplus(excess) + softplus(own)) / 2
    if with_gradient:
        row_sums = softplus(excess) + matrix.positives
        gradient *= (rows.shift - row_sums).exp()
        _add_both_directions(matrix, gradient, row_sums, softplus(everyones) + matrix.all_positives)
        matrix.finish(gradient.div_(2), (excess.sigmoid() + own.sigmoid()) / 2)
    return value, gradient


def _both_sums(matrix: "_Matrix", gradient: Float[Tensor, "b d"] | None) -> tuple["_Sums", "_Sums"]:
    """Of the own rows over all columns, and of all batch columns over everyone's rows.

    Powers times the bank's rows, which look for no student, are added to the gradient, at the rows' own shifts.
    """
    rows, columns = _Sums(matrix.positives, matrix.temperature), _Sums(matrix.all_positives, matrix.temperature)
    copy = matrix.new_buffer()
    for tile in matrix.column_tiles():
        for part in matrix.row_tiles():
            logits, left_out = matrix.logits(part, tile)
            if matrix.asks(tile) and not columns.fixed:
                columns.add(tile.place, copy(*logits.shape).copy_(logits).T, left_out.mirrored())
            shrink = rows.add(part, logits, left_out)
            if matrix.asks(tile) and columns.fixed:  # one shift for all: these are the powers of the columns too
                columns.total[tile.place] += rearrange(logits.sum(0), "n -> n 1")
            if gradient is not None and not matrix.asks(tile):
                if shrink is not None:
                    gradient[part] *= shrink
                gradient[part].addmm_(logits, tile.rows)
    columns.over_processes(matrix.share)
    return rows, columns


def _add_both_directions(
    matrix: "_Matrix", gradient: Float[Tensor, "b d"], row_sums: Float[Tensor, "b 1"], column_sums: Float[Tensor, "g 1"]
) -> None:
    """The softmax over each row and over each batch column, times these columns; the sums are their log-sum-exps."""
    copy = matrix.new_buffer()
    for tile in matrix.column_tiles():
        if matrix.asks(tile):
            for part in matrix.row_tiles():
                logits, left_out = matrix.logits(part, tile)
                _both_softmaxes_(logits, row_sums[part], column_sums[tile.place], left_out, copy)
                gradient[part].addmm_(logits, tile.rows)


def _both_softmaxes_(
    logits: Float[Tensor, "t n"],
    row_sums: Float[Tensor, "t 1"],
    column_sums: Float[Tensor, "n 1"],
    left_out: LeftOut,
    copy: Buffer,
) -> None:
    """Logits become the softmax over rows plus that over columns."""
    if kernels := engine.kernels_for(logits):
        kernels.both_softmaxes_(logits, row_sums, column_sums, **vars(left_out))
        return
    left_out.fill_(logits)
    mirrored = exp_(torch.sub(logits, column_sums.T, out=copy(*logits.shape)))
    exp_(logits.sub_(row_sums)).add_(mirrored)


class _Matrix:
    """The logits of one process's rows: cosines to all columns over the temperature, the twin and equal texts left out."""

    def __init__(
        self,
        share: Share,
        student: Tensor,
        teacher: Tensor,
        bank: Tensor | None,
        keys: Tensor | None,
        bank_keys: Tensor | None,
        temperature: float,
        false_negative_margin: float | None,
    ) -> None:
        dtype = working_dtype(student)
        self.share, self.temperature, self.margin = share, temperature, false_negative_margin
        self.student, self.teacher = UnitRows(student, dtype), UnitRows(teacher, dtype)
        self.columns = Columns(share, self.teacher, bank, keys, bank_keys)
        self._tile_sizes = engine.tile_sizes(student)
        self.positives = self._positives()
        self.all_positives = share.everyone(self.positives)
        self._buffer, self._teacher_buffer = self.new_buffer(), self.new_buffer() if self.margin else None

    def row_tiles(self) -> Iterator[slice]:
        return (slice(*bounds) for bounds in self.student.tiles(self._tile_sizes[0]))

    def column_tiles(self) -> Iterator[Tile]:
        return self.columns.tiles(self._tile_sizes[1])

    def new_buffer(self) -> Buffer:
        elements = min(self._tile_sizes[0], len(self.student)) * min(self._tile_sizes[1], self.columns.count)
        return Buffer(elements, self.student.raw, self.student.dtype)

    def new_gradient(self, wanted: bool) -> Float[Tensor, "b d"]:
        rows, width = self.student.raw.shape
        return self.student.raw.new_zeros((rows if wanted else 0, width), dtype=self.student.dtype)

    def asks(self, tile: Tile) -> bool:
        """Whether the tile's columns look for their students; those of the bank have none."""
        return tile.start < self.share.total

    def logits(self, rows: slice, tile: Tile) -> tuple[Float[Tensor, "t n"], LeftOut]:
        """And which are no negatives, besides those that the margin made -inf. In a buffer that the next call overwrites."""
        student = self.student.tile(rows.start, rows.stop)
        logits = self._buffer(len(student), len(tile.rows))
        torch.addmm(logits, student, tile.rows.T, beta=0, alpha=1 / self.temperature, out=logits)
        if self.margin and self._teacher_buffer:
            cosines = self._teacher_buffer(*logits.shape)
            torch.mm(self.teacher.tile(rows.start, rows.stop), tile.rows.T, out=cosines)
            logits.masked_fill_(cosines > 1 - self.margin, -torch.inf)
        return logits, self.columns.left_out(rows, tile)

    def mean(self, values: Float[Tensor, "b 1"]) -> Float[Tensor, ""]:
        """Over the rows of all processes."""
        return self.share.sum(values.sum()) / self.share.total

    def finish(self, gradient: Float[Tensor, "b d"], share_of_negatives: Float[Tensor, "b 1"]) -> None:
        """Subtract the positives, and go from the sum over unit rows to the mean over raw rows, in place.

        Of -t, student - t is added: what lies along the student is taken out anyway, and near convergence that is
        nearly all of t. Of a gradient whose negatives point everywhere it would leave the rounding, at 5e-5.
        """
        for buffer in (self._buffer, self._teacher_buffer):  # for what the passes below take
            if buffer:
                buffer.free()
        for rows in self.row_tiles():
            gradient[rows].addcmul_(share_of_negatives[rows], self.student.minus(self.teacher, rows.start, rows.stop))
        gradient /= self.temperature * self.share.total
        self.student.through_norms(gradient)

    def _positives(self) -> Float[Tensor, "b 1"]:
        parts = [
            (self.student.tile(start, stop) * self.teacher.tile(start, stop)).sum(-1, keepdim=True)
            for start, stop in self.student.tiles()
        ]
        empty = self.student.raw.new_empty((0, 1), dtype=self.student.dtype)
        return torch.cat([empty, *parts]) / self.temperature


class _Sums:
    """Z of rows (or columns): the sum of exp(logit - shift) over what is added."""

    def __init__(self, positives: Float[Tensor, "b 1"], temperature: float) -> None:
        self.positives = positives
        self.fixed = 2 / temperature <= WIDEST_RANGE
        self.shift = torch.full_like(positives, 1 / temperature - HEADROOM) if self.fixed else positives.clone()
        self.total = torch.zeros_like(positives)

    def add(self, rows: slice, logits: Float[Tensor, "t n"], left_out: LeftOut) -> Float[Tensor, "t 1"] | None:
        """Turn logits into exp(logit - shift), in place, and add them; returns the factor of what was added before, if not 1."""
        shift, total = self.shift[rows], self.total[rows]
        if kernels := engine.kernels_for(logits):
            return kernels.powers_(logits, shift, total, **vars(left_out), running=not self.fixed)
        left_out.fill_(logits)
        shrink = None
        if not self.fixed:
            highest = torch.maximum(shift, logits.amax(-1, keepdim=True))
            if highest.is_cuda or not torch.equal(highest, shift):
                shrink = (shift - highest).exp()
                total *= shrink
                shift.copy_(highest)
        total += exp_(logits.sub_(shift)).sum(-1, keepdim=True)
        return shrink

    def over_processes(self, share: Share) -> None:
        """The sums over everyone's rows."""
        if not self.fixed:
            own, self.shift = self.shift, share.max(self.shift.clone())
            self.total *= (own - self.shift).exp()
        share.sum(self.total)

    def excess(self) -> Float[Tensor, "b 1"]:
        """log Z - positive; -inf where there is no negative."""
        return self.total.log() + self.shift - self.positives


def softplus(x: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """log(1 + exp(x)), exact at both ends; F.softplus goes over to x at a threshold."""
    return torch.logaddexp(x, torch.zeros_like(x))
