"""Losses over N x N cosines from d x d moments: sums over rows of s^T s, s^T t and t^T t, which processes simply add up.

With S and T the unit rows, D = S - T and E = S S^T - T T^T, the sum of squares of E is |S^T S|^2 - 2 |S^T T|^2 + |T^T T|^2
and its gradient 4 E S. Near convergence these cancel: in float32 they go by E = S D^T + D S^T - D D^T, whose terms are as
small as D. Where the student is the teacher turned, D is large and E small, and where rows hardly differ from their mean,
that fills the moments: there, as where widths differ, float64.
Below some 1.7 d rows the N x N matrix costs less, and is made a tile of rows at a time.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from distill.streaming.engine import Share, exact_dtype, operator, reciprocal, share_of, tiles, working_dtype
from distill.streaming.joint import Joint, LazyUnitRows, mirrored, moment_dtype, new_buffer, sum_of_moments

# What the symmetric moments cost of a whole product: 6 of 9 blocks at width 768, 21 of 36 at 1536.
SYMMETRIC = 0.6
# The matrix is made where its multiplications are fewer than this times those of the moments. Measured on an EPYC at widths
# of 384 and 768: both take as long at 1.8 d rows for gram_mse, 1.7 d for cka, 2.8 d for similarity_preserving, 1 d columns.
DIRECT = 1.2
# Float32 has lost two digits of the squares, and one of the gradient, where |E|^2 is below this times |S D^T|^2.
CANCELLED = 0.02
# Above this mean squared cosine the moments are those of the mean row: at N = 3000 and d = 256, cosines of .9 put the
# gradient off by 3e-6 in float32, cosines of .99 by 3e-5.
NARROW = 0.85
# Mean squared distance of unit rows to their mean, below which they are one row: rounding to float32 makes 4e-15.
NO_VARIATION = 1e-12


@operator
def gram_mse(student: Tensor, teacher: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor]:
    """The mean of E^2. With widths d and e, and b own rows: products of .6 b (d + e)^2 and b d (d + e), or b g (2 d + e)."""
    share, dtype = share_of(student), moment_dtype(student)
    if student.shape[1] == teacher.shape[1] and dtype == torch.float32:
        value, gradient, lost = _gram_mse(share, student, teacher, dtype, with_gradient, near=True)
        if not _anywhere(share, lost):
            return _mean(value, share.total**2, student), gradient
    value, gradient, _ = _gram_mse(share, student, teacher, exact_dtype(student), with_gradient, near=False)
    return _mean(value, share.total**2, student), gradient


def _gram_mse(
    share: Share, student: Tensor, teacher: Tensor, dtype: torch.dtype, with_gradient: bool, near: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """|E|^2, the gradient of the mean, and whether they lost digits; from S and D if `near`, from S and T otherwise."""
    width, both = student.shape[1], student.shape[1] + teacher.shape[1]
    if _matrix_is_cheaper(share.total * (width + both), both * (SYMMETRIC * both + width)):
        return _gram_mse_direct(share, student, teacher, dtype, with_gradient, near)
    joint = Joint(share, student, teacher, dtype, difference=near)
    moments = joint.moments()
    own, across, other = moments[:width, :width], moments[width:, :width], moments[width:, width:]
    if near:
        reach = _inner(own, other)
        lost = _inner(own, own) > NARROW * share.total**2
        value = 2 * reach + 2 * _inner(across, across.T) + _inner(other, other) - 4 * _inner(across, other)
        lost |= value < CANCELLED * reach
        coefficients = torch.cat([across, own - across])
    else:
        value = _inner(own, own) - 2 * _inner(across, across) + _inner(other, other)
        lost = value.isnan()
        coefficients = torch.cat([own, -across])
    gradient = joint.new_gradient(with_gradient)
    if with_gradient:
        joint.add_products(gradient, coefficients, 4 / share.total**2)
    return value, gradient, lost


def _gram_mse_direct(
    share: Share, student: Tensor, teacher: Tensor, dtype: torch.dtype, with_gradient: bool, near: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """E by tiles of rows: S D^T + D T^T if `near`, S S^T - T T^T otherwise."""
    joint, left, right = _everyone(share, student, teacher, dtype, near)
    last = left - right if near else -right
    gradient, sums = joint.new_gradient(with_gradient), left.new_zeros(2, dtype=exact_dtype(left))
    for start, stop in tiles(len(student)):
        mine = slice(share.start + start, share.start + stop)
        matrix = left[mine] @ (right if near else left).T
        sums[1] += _squares(matrix)
        sums[0] += _squares(matrix.addmm_(right[mine], last.T))
        if with_gradient:
            joint.add(gradient, slice(start, stop), left[mine], matrix @ left, 4 / share.total**2)
    value, reach = share.sum(sums)
    return value, gradient, value < CANCELLED * reach


@operator
def cross_mse(student: Tensor, teacher: Tensor, bank: Tensor | None, with_gradient: bool) -> tuple[Tensor, Tensor]:
    """The mean of (D B^T)^2 = <D, D (B^T B)>: products of .6 n d^2 and b d^2 for n columns, or 2 of (b, n, d)."""
    share, dtype, width = share_of(student), moment_dtype(student), student.shape[1]
    columns = share.total + (0 if bank is None else len(bank))
    if _matrix_is_cheaper(2 * share.total * columns, width * (SYMMETRIC * columns + share.total)):
        return _cross_mse_direct(share, student, teacher, bank, dtype, with_gradient)
    moments = _column_moments(share, teacher, bank, dtype)
    if dtype == torch.float32 and _anywhere(share, _inner(moments, moments) > NARROW * columns**2):
        moments = _column_moments(share, teacher, bank, dtype := exact_dtype(student))
    joint = Joint(share, student, teacher, dtype, difference=True)
    gradient, value = joint.new_gradient(with_gradient), student.new_zeros((), dtype=exact_dtype(student))
    buffer = new_buffer(student, width, dtype)
    for rows, tile in joint.tiles():
        product = torch.mm(tile[:, width:], moments, out=buffer(len(tile), width))
        value += _twins(product, tile[:, width:]).sum()
        if with_gradient:
            joint.add(gradient, rows, tile[:, :width], product, 2 / (share.total * columns))
    return _mean(share.sum(value), share.total * columns, student), gradient


def _column_moments(share: Share, teacher: Tensor, bank: Tensor | None, dtype: torch.dtype) -> Float[Tensor, "d d"]:
    """Of everyone's teacher rows and the bank, which all processes have: each takes its part of it."""
    processes, own = len(share.sizes), [teacher]
    if bank is not None:
        own.append(bank[len(bank) * share.rank // processes : len(bank) * (share.rank + 1) // processes])
    some = (tile for rows in own for tile in LazyUnitRows(rows).tiles(dtype))
    return mirrored(share.sum(sum_of_moments(teacher, teacher.shape[1], some, dtype))).to(dtype)


def _cross_mse_direct(
    share: Share, student: Tensor, teacher: Tensor, bank: Tensor | None, dtype: torch.dtype, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    """D B^T by tiles."""
    width = student.shape[1]
    columns = [LazyUnitRows(share.everyone(teacher))] + ([] if bank is None else [LazyUnitRows(bank)])
    joint = Joint(share, student, teacher, dtype, difference=True)
    gradient, value = joint.new_gradient(with_gradient), student.new_zeros((), dtype=exact_dtype(student))
    count = sum(map(len, columns))
    for rows, tile in joint.tiles():
        total = torch.zeros_like(tile[:, width:])
        for column_tile in (column_tile for piece in columns for column_tile in piece.tiles(dtype)):
            matrix = tile[:, width:] @ column_tile.T
            value += _squares(matrix)
            if with_gradient:
                total.addmm_(matrix, column_tile)
        if with_gradient:
            joint.add(gradient, rows, tile[:, :width], total, 2 / (share.total * count))
    return _mean(share.sum(value), share.total * count, student), gradient


@operator
def similarity_preserving(student: Tensor, teacher: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor]:
    """Rows g of S S^T against rows h of T T^T, each at length 1: 2 (1 - cos) a pair, over all g^2 entries, in float64.

    |g|^2 = s (S^T S) s^T and g . h = s (S^T T) t^T. The gradient of cos is that of row i as a row, then of row i as a
    column of all rows, which needs moments that are weighted by row. 9.3 products of b d^2, or 3 of b g d.
    """
    share, dtype, width, other = share_of(student), exact_dtype(student), student.shape[1], teacher.shape[1]
    both = width + other
    products = SYMMETRIC * both**2 + 2 * both * width + width**2 + other * both
    if _matrix_is_cheaper(share.total * (2 * width + both), products):  # 3 products, and as long as one more in passes
        return _similarity_preserving_direct(share, student, teacher, with_gradient)
    joint = Joint(share, student, teacher, dtype)
    moments = joint.moments()
    gradient, value = joint.new_gradient(with_gradient), student.new_zeros((), dtype=dtype)
    weighted = moments.new_zeros((both, width))
    for rows, tile in joint.tiles():
        left, right = tile[:, :width], tile[:, width:]
        same, toward = left @ moments[:width, :width], right @ moments[width:, :width]
        squares, others = _twins(same, left), _twins(right @ moments[width:, width:], right)
        distances, shorter, closer = _row_cosines(squares, others, _twins(toward, left))
        value += distances.sum()
        if with_gradient:
            joint.add(gradient, rows, left, same * shorter - toward * closer, 2 / share.total**2)
            weighted.addmm_(torch.cat([left * shorter, right * -closer], -1).T, left)
    if with_gradient:
        joint.add_products(gradient, share.sum(weighted), 2 / share.total**2)
    return _mean(share.sum(value), share.total**2, student), gradient


def _similarity_preserving_direct(
    share: Share, student: Tensor, teacher: Tensor, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    joint, left, right = _everyone(share, student, teacher, exact_dtype(student), near=False)
    mine = slice(share.start, share.start + len(student))
    own, other = left[mine] @ left.T, right[mine] @ right.T
    distances, shorter, closer = _row_cosines(_twins(own, own), _twins(other, other), _twins(own, other))
    gradient = joint.new_gradient(with_gradient)
    if with_gradient:
        own *= shorter + share.everyone(shorter).T
        other *= closer + share.everyone(closer).T
        joint.add(gradient, slice(None), left[mine], own.sub_(other) @ left, 2 / share.total**2)
    return _mean(share.sum(distances.sum()), share.total**2, student), gradient


def _row_cosines(
    squares: Float[Tensor, "t 1"], others: Float[Tensor, "t 1"], products: Float[Tensor, "t 1"]
) -> tuple[Float[Tensor, "t 1"], Float[Tensor, "t 1"], Float[Tensor, "t 1"]]:
    """Of |g|^2, |h|^2 and g . h: the squared distance of g / |g| to h / |h|, cos / |g|^2, and 1 / (|g| |h|).

    The gradient of -cos is g times the second less h times the third. A row of zeros stays zero: both are 0.
    """
    closer = reciprocal(squares.sqrt() * others.sqrt())
    cosines = products * closer
    present = (squares > 0).to(cosines.dtype) + (others > 0).to(cosines.dtype)
    return (present - 2 * cosines).clamp(min=0), cosines * reciprocal(squares), closer


@operator
def cka(student: Tensor, teacher: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor]:
    """1 - |X^T Y|^2 / (|X^T X| |Y^T Y|) of centred unit rows, in float64. Products as of gram_mse."""
    share, width, both = share_of(student), student.shape[1], student.shape[1] + teacher.shape[1]
    if _matrix_is_cheaper(share.total * (width + both), both * (SYMMETRIC * both + width)):
        return _cka_direct(share, student, teacher, with_gradient)
    joint = Joint(share, student, teacher, exact_dtype(student))
    means = joint.means()
    moments = joint.moments().addmm_(means[:, None], means[None], alpha=-share.total)
    own, across, other = moments[:width, :width], moments[width:, :width], moments[width:, width:]
    variation = torch.minimum(own.trace(), other.trace()) / share.total
    sums = torch.stack([_inner(own, own), _inner(across, across), _inner(other, other)])
    value, same, toward = _cka_terms(sums, variation)
    gradient = joint.new_gradient(with_gradient)
    if with_gradient:
        coefficients = torch.cat([own * same, across * -toward])
        joint.add_products(gradient, coefficients, 2.0, offset=means @ coefficients)
    return _mean(value, 1, student), gradient


def _cka_direct(share: Share, student: Tensor, teacher: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor]:
    """From the centred Gram matrices: |X^T Y|^2 = <X X^T, Y Y^T>."""
    joint, left, right = _everyone(share, student, teacher, exact_dtype(student), near=False)
    mine = slice(share.start, share.start + len(student))
    x, y = left - left.mean(0), right - right.mean(0)
    own, other = x[mine] @ x.T, y[mine] @ y.T
    sums = share.sum(torch.stack([_inner(own, own), _inner(own, other), _inner(other, other)]))
    value, same, toward = _cka_terms(sums, torch.minimum(_squares(x), _squares(y)) / share.total)
    gradient = joint.new_gradient(with_gradient)
    if with_gradient:
        joint.add(gradient, slice(None), left[mine], (own * same).sub_(other.mul_(toward)) @ x, 2.0)
    return _mean(value, 1, student), gradient


def _cka_terms(
    sums: Float[Tensor, "3"], variation: Float[Tensor, ""]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""], Float[Tensor, ""]]:
    """The value; half the gradient of X is X (X^T X) times the second less Y (Y^T X) times the third. All 0 of no variation."""
    own, product, other = sums.unbind()
    toward = reciprocal(own.sqrt() * other.sqrt())
    terms = torch.stack([1 - product * toward, product * toward * reciprocal(own), toward])
    value, same, toward = torch.where(variation <= NO_VARIATION, 0, terms).unbind()
    return value, same, toward


def _everyone(
    share: Share, student: Tensor, teacher: Tensor, dtype: torch.dtype, near: bool
) -> tuple[Joint, Float[Tensor, "g d"], Float[Tensor, "g e"]]:
    """The own rows; S of all processes; and T, or S - T if `near`."""
    rows = Joint(share, share.everyone(student), share.everyone(teacher), dtype, difference=near).whole()
    return Joint(share, student, teacher, dtype), rows[:, : student.shape[1]], rows[:, student.shape[1] :]


def _anywhere(share: Share, flag: Tensor) -> bool:
    """Processes agree, also where their last bits do not. A host synchronisation: not for CUDA."""
    return bool(share.max(flag.float()))


def _matrix_is_cheaper(matrix: int, moments: float) -> bool:
    """By the multiplications of a row."""
    return matrix < DIRECT * moments


def _inner(a: Float[Tensor, "d e"], b: Float[Tensor, "d e"]) -> Float[Tensor, ""]:
    return (a * b).sum(-1).sum(dtype=exact_dtype(a))


def _twins(a: Float[Tensor, "t d"], b: Float[Tensor, "t d"]) -> Float[Tensor, "t 1"]:
    return (a * b).sum(-1, keepdim=True)


def _squares(matrix: Float[Tensor, "t n"]) -> Float[Tensor, ""]:
    return torch.linalg.vector_norm(matrix, dtype=exact_dtype(matrix)).square()


def _mean(total: Float[Tensor, ""], count: int, student: Tensor) -> Float[Tensor, ""]:
    """No square is negative, but float64 leaves -1e-16 where a difference of sums is 0."""
    return (total / count).clamp(min=0).to(working_dtype(student))
