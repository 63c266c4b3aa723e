"""Park et al.'s two losses over pairs of rows, by hand: distances tile by tile, angles anchor by anchor.

Both compare distances of unit rows; a zero row lies at the origin. The rows are first moved by their mean, which leaves
every distance: those of a student whose rows are all alike keep their digits, which 2 - 2 cosines would not. All is in
float64: the difference of two distances that nearly agree is lost in float32, with an error of 6e-4 of the gradient
where rows differ from their twins by .005.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from distill.similarity import evenly_spaced, normalize
from distill.streaming import engine
from distill.streaming.engine import (
    Buffer,
    Share,
    UnitRows,
    exact_dtype,
    operator,
    reciprocal,
    share_of,
    tiles,
    working_dtype,
)

# Rows and columns of a tile of distances: smaller ones save more of the mirrored pairs. With 6 products as 1, 1,024 rows
# of width 768 took .96 with tiles of 256, .98 with 512 and 1.26 with 1,024.
SIDE = 256
# On CUDA, where passes over a small tile are over before the next is launched.
CUDA_SIDE = 2048


@operator
def rkd_distance(student: Tensor, teacher: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor]:
    """4 products of (n, n, d) and 2 without gradient: a pair within the share is computed once. 3 and 2 where they are kept.

    With x = D / mean(D) the gradient at D_ij is (slope_ij - drift) / mean(D), where the mean gives `drift` back.
    """
    share, dtype = share_of(student), exact_dtype(student)
    points = Points(share.everyone(student), dtype)
    matrices = _Distances(share, len(student), points, Points(share.everyone(teacher), dtype))
    lengths, counts = share.sum(_sums(matrices, student)).unbind(-1)
    scales = (counts / lengths.clamp(min=torch.finfo(lengths.dtype).tiny)).to(dtype)
    value, pull = share.sum(_huber_sums(matrices, scales, student)) / share.total**2
    gradient = student.new_zeros((len(student) if with_gradient else 0, student.shape[1]), dtype=dtype)
    if with_gradient:
        drift = (pull * share.total**2 * scales[0] / counts[0].clamp(min=1)).to(dtype)
        _add_pulls(matrices, scales, drift, gradient)
        gradient *= 2 * scales[0] / share.total**2
        UnitRows(student, dtype).through_norms(gradient)
    return value.to(working_dtype(student)), gradient.to(working_dtype(student))


class Points:
    """Unit rows about their mean, and how far they are from each other."""

    def __init__(self, rows: Float[Tensor, "n d"], dtype: torch.dtype) -> None:
        unit = normalize(rows.to(dtype))
        self.rows = unit - unit.mean(0)
        self.squares = self.rows.square().sum(-1)
        # Below it a squared distance is the rounding of the sums, or that of the rows as they came, where they are all alike.
        eps, eps_of_rows = torch.finfo(dtype).eps, torch.finfo(working_dtype(rows)).eps
        self.nothing = (16 * eps * self.squares.max()).clamp(min=(8 * eps_of_rows) ** 2)

    def squared_distances(self, rows: slice, columns: slice) -> Float[Tensor, "b n"]:
        """0 between equal rows, exactly."""
        squares = rearrange(self.squares[rows], "b -> b 1") + self.squares[columns]
        squares.addmm_(self.rows[rows], self.rows[columns].T, alpha=-2)
        if rows == columns:
            squares.fill_diagonal_(0)
        return squares.masked_fill_(squares <= self.nothing, 0)


@dataclass(frozen=True)
class _Tile:
    """Distances of some rows to some rows. If `times` is 2 the tile stands for its mirror image too."""

    rows: slice
    columns: slice
    times: int
    student: Float[Tensor, "b n"]
    teacher: Float[Tensor, "b n"]

    def huber(self, scales: Float[Tensor, "2"]) -> tuple[Float[Tensor, "b n"], Float[Tensor, "b n"]]:
        """The difference of the scaled distances, and the slope of Huber's function there; it is slope * (x - slope / 2)."""
        difference = (self.student * scales[0]).addcmul_(self.teacher, scales[1], value=-1)
        return difference, difference.clamp(-1, 1)


class _Distances:
    """All pairs of the share's rows with everyone's, tile by tile; pairs within the share stand on one side only."""

    def __init__(self, share: Share, own: int, student: Points, teacher: Points) -> None:
        self.share, self.own, self.student, self.teacher = share, own, student, teacher
        small = 4 * own * share.total <= engine.KEPT  # two matrices of float64
        self._kept = list(self._tiles()) if small else None

    def __iter__(self) -> Iterator[_Tile]:
        return self._tiles() if self._kept is None else iter(self._kept)

    def _tiles(self) -> Iterator[_Tile]:
        start, stop = self.share.start, self.share.start + self.own
        side = CUDA_SIDE if self.student.rows.is_cuda else min(SIDE, engine.TILE)
        mine = [slice(start + a, start + b) for a, b in tiles(self.own, side)]
        before = [slice(*bounds) for bounds in tiles(start, side)]
        after = [slice(stop + a, stop + b) for a, b in tiles(self.share.total - stop, side)]
        for place, rows in enumerate(mine):
            for columns in (*mine[place:], *before, *after):
                mirrored = start <= columns.start < stop and columns != rows
                distances = [x.squared_distances(rows, columns).sqrt_() for x in (self.student, self.teacher)]
                yield _Tile(rows, columns, 1 + mirrored, *distances)


def _sums(matrices: _Distances, like: Tensor) -> Float[Tensor, "2 2"]:
    """Of student and teacher: the sum of all distances, and how many are not 0."""
    total = like.new_zeros((2, 2), dtype=exact_dtype(like))
    for tile in matrices:
        pairs = [(x.sum(), x.count_nonzero().to(x.dtype)) for x in (tile.student, tile.teacher)]
        total += tile.times * torch.stack([torch.stack(pair) for pair in pairs])
    return total


def _huber_sums(matrices: _Distances, scales: Float[Tensor, "2"], like: Tensor) -> Float[Tensor, "2"]:
    """The sum of Huber's function, and of slope * student distance."""
    total = like.new_zeros(2, dtype=exact_dtype(like))
    for tile in matrices:
        difference, slope = tile.huber(scales)
        pull = (slope * tile.student).sum()
        value = difference.sub_(slope, alpha=0.5).mul_(slope).sum()
        total += tile.times * torch.stack([value, pull])
    return total


def _add_pulls(
    matrices: _Distances, scales: Float[Tensor, "2"], drift: Float[Tensor, ""], gradient: Float[Tensor, "b d"]
) -> None:
    """sum over j of (slope_ij - drift) / D_ij * (x_i - x_j), into zeros."""
    points, start = matrices.student.rows, matrices.share.start
    sums = gradient.new_zeros((len(gradient), 1))

    def add(rows: slice, columns: slice, weights: Float[Tensor, "b n"]) -> None:
        local = slice(rows.start - start, rows.stop - start)
        gradient[local].addmm_(weights, points[columns], alpha=-1)
        sums[local] += weights.sum(-1, keepdim=True)

    for tile in matrices:
        weights = (tile.huber(scales)[1] - drift).mul_(reciprocal(tile.student))
        add(tile.rows, tile.columns, weights)
        if tile.times == 2:
            add(tile.columns, tile.rows, weights.T)
    gradient.addcmul_(sums, points[start : start + len(gradient)])


@operator
def rkd_angle(student: Tensor, teacher: Tensor, anchors: int, with_gradient: bool) -> tuple[Tensor, Tensor]:
    """Per anchor some ten passes over an (n, n) matrix; anchors are dealt out to the processes, which sum one such matrix.

    The angle at k is a function of the squared distances ij, ik, jk; `pull` collects the gradient of the student's.
    """
    share, dtype = share_of(student), exact_dtype(student)
    count, own = share.total, slice(share.start, share.start + len(student))
    points = Points(share.everyone(student), dtype)
    halves = [
        x.squared_distances(slice(0, count), slice(0, count)).div_(2)
        for x in (points, Points(share.everyone(teacher), dtype))
    ]
    angles = _Angles(halves[0], halves[1], with_gradient)
    for anchor in evenly_spaced(count, anchors)[share.rank :: len(share.sizes)]:
        angles.add(anchor)
    terms = min(anchors, count) * count**2
    value = share.sum(angles.total) / terms
    gradient = student.new_zeros((len(student) if with_gradient else 0, student.shape[1]), dtype=dtype)
    share.sum(angles.pull)
    if with_gradient:
        weights = angles.pull[own] + angles.pull[:, own].T
        torch.addmm(weights.sum(-1, keepdim=True) * points.rows[own], weights, points.rows, alpha=-1, out=gradient)
        UnitRows(student, dtype).through_norms(gradient.mul_(2 / terms))
    return value.to(working_dtype(student)), gradient.to(working_dtype(student))


class _Angles:
    """Huber's function of the differences of cosines at anchors; matrices of halved squared distances."""

    def __init__(self, student: Float[Tensor, "n n"], teacher: Float[Tensor, "n n"], with_gradient: bool) -> None:
        self.student, self.teacher = student, teacher
        self.total = student.new_zeros((), dtype=exact_dtype(student))
        self.pull = torch.zeros_like(student) if with_gradient else student.new_empty(0)
        self._height = max(1, engine.TILE**2 // max(1, len(student)))
        elements = min(self._height, len(student)) * len(student)
        self._buffers = [Buffer(elements, student, student.dtype) for _ in range(3)]

    def add(self, anchor: int) -> None:
        lengths, teacher_lengths = ((2 * x[anchor]).sqrt() for x in (self.student, self.teacher))
        inverses, teacher_inverses = reciprocal(lengths), reciprocal(teacher_lengths)
        for bounds in tiles(len(self.student), self._height):
            rows = slice(*bounds)
            ours, difference, slope = (buffer(bounds[1] - bounds[0], len(self.student)) for buffer in self._buffers)
            _cosines(self.student, lengths, inverses, rows, ours, slope)
            _cosines(self.teacher, teacher_lengths, teacher_inverses, rows, difference, slope)
            torch.sub(ours, difference, out=difference)
            torch.clamp(difference, -1, 1, out=slope)
            self.total += torch.dot(difference.sub_(slope, alpha=0.5).view(-1), slope.view(-1))
            if len(self.pull):
                along = ours.mul_(slope).sum(-1)
                self.pull[rows, anchor] += inverses[rows] * (slope @ inverses - inverses[rows] * along)
                self.pull[rows].addcmul_(slope.mul_(rearrange(inverses[rows], "b -> b 1")), inverses, value=-0.5)


def _cosines(
    halves: Float[Tensor, "n n"],
    lengths: Float[Tensor, " n"],
    inverses: Float[Tensor, " n"],
    rows: slice,
    out: Float[Tensor, "b n"],
    scratch: Float[Tensor, "b n"],
) -> None:
    """The cosine of the angle between i and j, seen from the anchor: (d_i / d_j + d_j / d_i - D_ij^2 / (d_i d_j)) / 2."""
    length, inverse = (rearrange(x[rows], "b -> b 1") for x in (lengths, inverses))
    torch.mul(length / 2, inverses, out=out)
    torch.addcmul(
        lengths / -2, halves[rows], inverses, out=scratch
    )  # six times faster than with columns for these rows
    out.addcmul_(scratch, inverse, value=-1)
