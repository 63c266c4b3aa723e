"""The order of all pairs of rows by their cosines, without comparing every pair with every pair.

A hinge that is active adds 1 to one pair and takes 1 from another: value and gradient need only, for each of P pairs, how
many others stand lower with the teacher and too high with the student. Such counts over two orders are what a wavelet
tree answers in log2(P) steps of a few passes over P numbers.
"""

import torch
from einops import rearrange
from jaxtyping import Float, Int, Int32
from torch import Tensor

from distill.similarity import normalize
from distill.streaming.engine import UnitRows, operator, share_of, working_dtype


@operator
def rank_hinge(
    student: Tensor, teacher: Tensor, margin: float, shared: bool, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    """2 products of (n, n, d) and two sorts of P = n (n - 1) / 2 numbers, on each process; the counting is shared out.

    Cosines are float64: which of two hinges is active, and who comes first, are decided by their last digits.
    """
    share, dtype = share_of(student, shared), working_dtype(student)
    unit = normalize(share.everyone(student).double())
    cosines, pairs = unit @ unit.T, torch.triu_indices(share.total, share.total, 1, device=student.device)
    order = _Order(cosines[pairs[0], pairs[1]], _teacher_cosines(share.everyone(teacher))[pairs[0], pairs[1]], margin)
    mine = slice(*(len(order.ranks) * place // len(share.sizes) for place in (share.rank, share.rank + 1)))
    raised, lowered = share.sum(order.active(mine))
    comparisons = order.lower.sum().clamp(min=1)
    net = (lowered - raised).double()
    value = (margin * raised.sum().double() + net @ order.values) / comparisons
    gradient = student.new_zeros((len(student) if with_gradient else 0, student.shape[1]), dtype=dtype)
    if with_gradient:
        i, j = pairs[:, order.places]
        weights = cosines.zero_().index_put_((i, j), net / comparisons).to(dtype)
        own = slice(share.start, share.start + len(student))
        torch.mm((weights + weights.T)[own], unit.to(dtype), out=gradient)
        UnitRows(student, dtype).through_norms(gradient)
    return value.to(dtype), gradient


def _teacher_cosines(rows: Float[Tensor, "n e"]) -> Float[Tensor, "n n"]:
    """Two equal texts have the same number with every third, to the last bit, and any two equal rows exactly 1 (zero rows 0).

    A matrix product promises neither: its sums may be ordered otherwise in another row. Every row gives way to its first copy.
    """
    unit = normalize(rows.double())
    cosines = unit @ unit.T
    cosines.diagonal().round_()
    first = _first_copies(rows)
    row, column = rearrange(first, "n -> n 1"), rearrange(first, "n -> 1 n")
    return cosines[torch.minimum(row, column), torch.maximum(row, column)]


def _first_copies(rows: Float[Tensor, "n e"]) -> Int[Tensor, " n"]:
    """The number of the first row with the same entries, by a 64-bit hash of their bits."""
    bits = (rows.double() + 0.0).view(torch.int64)  # -0 and 0 are one number
    generator = torch.Generator(device=rows.device).manual_seed(0)
    factors = torch.randint(-(2**63), 2**63 - 1, (rows.shape[1],), generator=generator, device=rows.device)
    hashes = ((bits ^ (bits >> 32)) * factors).sum(-1)
    return (rearrange(hashes, "n -> n 1") == hashes).int().argmax(-1)


class _Order:
    """P pairs in the teacher's order, and where the student puts each.

    Counting is exact: positions are int32, which serves up to 65,536 rows.
    """

    def __init__(self, student: Float[Tensor, " p"], teacher: Float[Tensor, " p"], margin: float) -> None:
        teacher, self.places = teacher.sort()
        self.values = student[self.places]
        ordered, places = self.values.sort()
        self.ranks = torch.empty_like(places, dtype=torch.int32)
        self.ranks[places] = torch.arange(len(places), dtype=torch.int32, device=places.device)
        # Pairs tied by the teacher, places lower:upper, have no order among themselves.
        self.lower = torch.searchsorted(teacher, teacher, out_int32=True)
        self.upper = torch.searchsorted(teacher, teacher, out_int32=True, right=True)
        # A hinge between a higher p and a lower q is active where student_p - margin < student_q.
        floors = ordered - margin
        self.reached = torch.searchsorted(ordered, floors, out_int32=True, right=True)
        self.reaching = torch.searchsorted(floors, ordered, out_int32=True)

    def active(self, some: slice) -> Int[Tensor, "2 p"]:
        """Of some places, how many active hinges would raise the pair there, and how many lower it; 0 for the others."""
        lower, upper, ranks = self.lower[some], self.upper[some], self.ranks[some]
        below, above = self.reached.index_select(0, ranks), self.reaching.index_select(0, ranks)
        first, last = count_lower(self.ranks, torch.stack([lower, upper]), torch.stack([below, above]))
        counts = self.ranks.new_zeros((2, len(self.ranks)), dtype=torch.int64)
        counts[0, some], counts[1, some] = lower - first, above - last
        return counts


def count_lower(
    ranks: Int32[Tensor, " p"], upto: Int32[Tensor, "*queries"], limit: Int32[Tensor, "*queries"]
) -> Int32[Tensor, "*queries"]:
    """How many of the first `upto` ranks, a permutation of 0..p-1, are below `limit`: a wavelet tree, level by level.

    A level holds the ranks in the order of their higher bits, within these as they came: a node is those that share the
    higher bits, and starts where its lowest rank would stand in sorted order. Zeros of the level's bit go left.
    """
    count, places = torch.zeros_like(upto), torch.arange(len(ranks), dtype=torch.int32, device=ranks.device)
    zeros_before = ranks.new_zeros(len(ranks) + 1)
    place = upto
    for level in reversed(range(len(ranks).bit_length())):
        bit = 1 << level
        torch.cumsum(ranks & bit == 0, 0, dtype=torch.int32, out=zeros_before[1:])
        # All nodes to the left are full: half of what they hold are zeros.
        node = limit & -(2 * bit)
        zeros = zeros_before.index_select(0, place.view(-1)).view_as(place) - (node >> 1)
        right = limit & bit != 0
        count += zeros.where(right, 0)
        place = torch.where(right, place - zeros + bit, node + zeros)
        node = ranks & -(2 * bit)
        zeros = zeros_before[:-1] - (node >> 1)
        target = torch.where(ranks & bit != 0, places - zeros + bit, node + zeros)
        ranks = torch.empty_like(ranks).scatter_(0, target.long(), ranks)
    return count
