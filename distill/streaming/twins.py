"""Each student row against its twin: the squared distance d of unit rows, and 1 - cosine, which is d / 2.

The gradient comes from the difference of the unit rows itself: 1 - cosine in float32 has no digits left below 1e-7.
"""

from torch import Tensor

from distill.similarity import row_lengths
from distill.streaming.engine import UnitRows, operator, share_of, working_dtype


@operator
def squared_distance(student: Tensor, teacher: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor]:
    """Mean over rows of the squared distance of unit rows; a zero row stays 0, hence at distance 1 from its twin. O(b d)."""
    share, dtype = share_of(student), working_dtype(student)
    rows, twins = UnitRows(student, dtype), UnitRows(teacher, dtype)
    gradient = student.new_zeros((len(student) if with_gradient else 0, student.shape[1]), dtype=dtype)
    total = student.new_zeros((), dtype=dtype)
    for start, stop in rows.tiles():
        difference = rows.minus(twins, start, stop)
        total += difference.square().sum()
        if with_gradient:
            gradient[start:stop] = difference
    if with_gradient:
        rows.through_norms(gradient.mul_(2 / share.total))
    return share.sum(total) / share.total, gradient


@operator
def cosine_distance(student: Tensor, teacher: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor]:
    """Half of the above; a pair with a zero row has cosine 0, hence counts 1."""
    share = share_of(student)
    value, gradient = squared_distance.compute(student, teacher, with_gradient)
    zeros = (row_lengths(student) == 0).to(value.dtype) + (row_lengths(teacher) == 0).to(value.dtype)
    return (value + share.sum(zeros.sum()) / share.total) / 2, gradient / 2
