"""The passes over a tile of the matrix as Triton kernels: in place, one program a row, float32.

Imported by `engine.kernels_for` alone, once a tile on CUDA comes: Triton is no dependency. The plain functions in
`contrastive` and `divergence` say what each kernel computes. tl.exp(x) is off by |x| * 6e-8, as is a logit of that size.
`no_type_check` keeps mypy and the shape checks of the tests away from what Triton reads as source.
"""

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float, Int
from torch import Tensor


def powers_(
    logits: Float[Tensor, "t n"],
    shift: Float[Tensor, "t 1"],
    total: Float[Tensor, "t 1"],
    *,
    twin: int,
    keys: Int[Tensor, " t"] | None,
    column_keys: Int[Tensor, " n"] | None,
    running: bool,
) -> Float[Tensor, "t 1"] | None:
    """Logits become exp(logit - shift), 0 where a column is left out, and are added to `total`.

    Row r's twin is column r + twin. `running` raises the shifts to the largest logits, and returns what sums so far shrink by.
    """
    shrink = torch.empty_like(shift) if running else None
    _launch(_powers, logits, (logits, shift, total, shrink, *_contiguous(keys, column_keys), twin))
    return shrink


def both_softmaxes_(
    logits: Float[Tensor, "t n"],
    row_sums: Float[Tensor, "t 1"],
    column_sums: Float[Tensor, "n 1"],
    *,
    twin: int,
    keys: Int[Tensor, " t"] | None,
    column_keys: Int[Tensor, " n"] | None,
) -> None:
    """Logits become exp(logit - row sum) + exp(logit - column sum), 0 where a column is left out."""
    _launch(_both_softmaxes, logits, (logits, row_sums, column_sums, *_contiguous(keys, column_keys), twin))


def divergence_rows(
    logits: Float[Tensor, "t n"], delta: Float[Tensor, "t n"], near: Bool[Tensor, "t 1"], *, into_delta: bool
) -> Float[Tensor, "t 3"]:
    """Of each row: the divergence, the teacher's log-sum-exp, and the student's; `delta` becomes q - p if asked.

    Of a near row the third is w, of `delta` less its mean, and the divergence lacks log1p(w) - w.
    """
    sums = logits.new_empty((len(logits), 3))
    _launch(_divergence_rows, logits, (logits, delta, near.contiguous(), sums), INTO_DELTA=into_delta)
    return sums


def both_differences_(
    logits: Float[Tensor, "t n"], delta: Float[Tensor, "t n"], rows: Float[Tensor, "t 2"], columns: Float[Tensor, "2 n"]
) -> None:
    """`delta` becomes (q - p) of the rows plus that of the columns, from the log-sum-exps of teacher and student."""
    _launch(_both_differences, logits, (logits, delta, rows, columns))


def check(device: torch.device) -> None:
    """Raises whatever Triton does where it cannot compile."""
    powers_(*torch.zeros((3, 1, 1), device=device), twin=0, keys=None, column_keys=None, running=False)


def _launch(kernel: Any, matrix: Float[Tensor, "t n"], arguments: tuple[Any, ...], **constants: bool) -> None:
    rows, width = matrix.shape
    if rows and width:
        block = min(triton.next_power_of_2(width), 2048)
        with torch.cuda.device_of(matrix):  # Triton launches on the current device, whatever its arguments are on
            kernel[(rows,)](*arguments, width, BLOCK=block, num_warps=8 if block > 1024 else 4, **constants)


def _contiguous(*keys: Tensor | None) -> list[Tensor | None]:
    return [None if these is None else these.contiguous() for these in keys]


@triton.jit(do_not_specialize=["twin"])
@no_type_check
def _powers(logits, shift, total, shrink, keys, column_keys, twin, width, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    logits += row.to(tl.int64) * width
    highest = tl.load(shift + row)
    before = tl.load(total + row)
    if shrink is not None:
        lowest = highest
        for first in range(0, width, BLOCK):
            columns = first + tl.arange(0, BLOCK)
            left_out = _is_left_out(row, columns, width, keys, column_keys, twin)
            values = tl.load(logits + columns, columns < width, other=float("-inf"))
            highest = tl.maximum(highest, tl.max(tl.where(left_out, float("-inf"), values), 0))
        factor = tl.exp(lowest - highest)
        before *= factor
        tl.store(shift + row, highest)
        tl.store(shrink + row, factor)
    sums = tl.zeros([BLOCK], tl.float32)
    for first in range(0, width, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        left_out = _is_left_out(row, columns, width, keys, column_keys, twin)
        values = tl.load(logits + columns, columns < width, other=float("-inf"))
        powers = tl.where(left_out, 0.0, tl.exp(values - highest))
        tl.store(logits + columns, powers, columns < width)
        sums += powers
    tl.store(total + row, before + tl.sum(sums, 0))


@triton.jit(do_not_specialize=["twin"])
@no_type_check
def _both_softmaxes(logits, row_sums, column_sums, keys, column_keys, twin, width, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    logits += row.to(tl.int64) * width
    own = tl.load(row_sums + row)
    for first in range(0, width, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        left_out = _is_left_out(row, columns, width, keys, column_keys, twin)
        values = tl.load(logits + columns, columns < width, other=float("-inf"))
        powers = tl.exp(values - own) + tl.exp(values - tl.load(column_sums + columns, columns < width, other=0.0))
        tl.store(logits + columns, tl.where(left_out, 0.0, powers), columns < width)


@triton.jit
@no_type_check
def _is_left_out(row, columns, width, keys, column_keys, twin):
    left_out = (columns >= width) | (columns == row + twin)
    if keys is not None:
        left_out |= tl.load(keys + row) == tl.load(column_keys + columns, columns < width, other=0)
    return left_out


@triton.jit
@no_type_check
def _divergence_rows(logits, delta, near, sums, width, BLOCK: tl.constexpr, INTO_DELTA: tl.constexpr):
    row = tl.program_id(0)
    logits += row.to(tl.int64) * width
    delta += row.to(tl.int64) * width
    is_near = tl.load(near + row) != 0
    highest = tl.full([], float("-inf"), tl.float32)
    student_highest = tl.full([], float("-inf"), tl.float32)
    for first in range(0, width, BLOCK):
        values, change = _both(logits, delta, first + tl.arange(0, BLOCK), width)
        highest = tl.maximum(highest, tl.max(values, 0))
        student_highest = tl.maximum(student_highest, tl.max(values + change, 0))
    # A row of nothing has sums of 0, which count as 1.
    highest = tl.where(highest == float("-inf"), 0.0, highest)
    student_highest = tl.where(student_highest == float("-inf"), 0.0, student_highest)
    mean = tl.full([], 0.0, tl.float32)
    if is_near:
        weights = tl.zeros([BLOCK], tl.float32)
        changes = tl.zeros([BLOCK], tl.float32)
        for first in range(0, width, BLOCK):
            values, change = _both(logits, delta, first + tl.arange(0, BLOCK), width)
            p = tl.exp(values - highest)
            weights += p
            changes += p * change
        mean = tl.sum(changes, 0) / _or_one(tl.sum(weights, 0))
    total = tl.zeros([BLOCK], tl.float32)
    student_total = tl.zeros([BLOCK], tl.float32)
    value = tl.zeros([BLOCK], tl.float32)
    w = tl.zeros([BLOCK], tl.float32)
    for first in range(0, width, BLOCK):
        values, change = _both(logits, delta, first + tl.arange(0, BLOCK), width)
        growth, excess = _expm1(tl.where(is_near, change - mean, 0.0))
        p = tl.exp(values - highest)
        total += p
        student_total += tl.exp(values + change - student_highest)
        value += p * tl.where(is_near, excess, -change)
        w += p * growth
    sum_p = _or_one(tl.sum(total, 0))
    sum_q = _or_one(tl.sum(student_total, 0))
    divergence = tl.sum(value, 0) / sum_p
    mean_growth = tl.sum(w, 0) / sum_p
    teacher_sum = tl.log(sum_p) + highest
    student_sum = tl.log(sum_q) + student_highest
    tl.store(sums + 3 * row, tl.where(is_near, divergence, divergence + (student_sum - teacher_sum)))
    tl.store(sums + 3 * row + 1, teacher_sum)
    tl.store(sums + 3 * row + 2, tl.where(is_near, mean_growth, student_sum))
    if INTO_DELTA:
        for first in range(0, width, BLOCK):
            columns = first + tl.arange(0, BLOCK)
            values, change = _both(logits, delta, columns, width)
            growth, _ = _expm1(tl.where(is_near, change - mean, 0.0))
            p = tl.exp(values - highest) / sum_p
            q = tl.exp(values + change - student_highest) / sum_q
            difference = tl.where(is_near, p * (growth - mean_growth) / (1.0 + mean_growth), q - p)
            tl.store(delta + columns, difference, columns < width)


@triton.jit
@no_type_check
def _both_differences(logits, delta, rows, sums, width, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    logits += row.to(tl.int64) * width
    delta += row.to(tl.int64) * width
    teacher_sum = tl.load(rows + 2 * row)
    student_sum = tl.load(rows + 2 * row + 1)
    for first in range(0, width, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        values, change = _both(logits, delta, columns, width)
        teacher_sums = tl.load(sums + columns, columns < width, other=0.0)
        student_sums = tl.load(sums + width + columns, columns < width, other=0.0)
        of_row = tl.exp(values + change - student_sum) - tl.exp(values - teacher_sum)
        of_columns = tl.exp(values + change - student_sums) - tl.exp(values - teacher_sums)
        tl.store(delta + columns, of_row + of_columns, columns < width)


@triton.jit
@no_type_check
def _both(logits, delta, columns, width):
    inside = columns < width
    return tl.load(logits + columns, inside, other=float("-inf")), tl.load(delta + columns, inside, other=0.0)


@triton.jit
@no_type_check
def _or_one(total):
    return tl.where(total == 0.0, 1.0, total)


@triton.jit
@no_type_check
def _expm1(x):
    """expm1(x) and expm1(x) - x, both to the last digits: Triton has no expm1 of its own."""
    small = tl.where(tl.abs(x) < 0.5, x, 0.0)
    series = small / 40320 + 1 / 5040
    series = series * small + 1 / 720
    series = series * small + 1 / 120
    series = series * small + 1 / 24
    series = series * small + 1 / 6
    series = (series * small + 0.5) * small * small
    growth = tl.where(tl.abs(x) < 0.5, small + series, tl.exp(x) - 1.0)
    return growth, tl.where(tl.abs(x) < 0.5, series, growth - x)
