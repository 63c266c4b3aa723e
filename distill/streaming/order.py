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

# Rows whose pairs can be numbered in int32, as positions are.
MOST = 65536


@operator
def rank_hinge(student: Tensor, teacher: Tensor, margin: float, with_gradient: bool) -> tuple[Tensor, Tensor]:
    """2 products of (n, n, d) and two sorts of P = n (n - 1) / 2 numbers, on each process; the counting is shared out.

    Cosines are float64: which of two hinges is active, and who comes first, are decided by their last digits.
    """
    share, dtype = share_of(student), working_dtype(student)
    if share.total > MOST:
        raise ValueError(f"rank_hinge orders the pairs of at most {MOST:,} rows, got {share.total:,}. Give it fewer.")
    unit = normalize(share.everyone(student).double())
    cosines = (unit @ unit.T).view(-1)
    i, j = torch.triu_indices(share.total, share.total, 1, device=student.device)
    pairs = i * share.total + j
    order = _Order(cosines[pairs], _teacher_cosines(share.everyone(teacher)).view(-1)[pairs], margin)
    mine = slice(*(len(order.ranks) * place // len(share.sizes) for place in (share.rank, share.rank + 1)))
    raised, lowered = share.sum(order.active(mine))
    comparisons = order.lower.sum().clamp(min=1)
    net = (lowered - raised).double()
    value = (margin * raised.sum().double() + net @ order.values) / comparisons + 0 * order.teacher_sum  # NaN stays NaN
    gradient = student.new_zeros((len(student) if with_gradient else 0, student.shape[1]), dtype=dtype)
    if with_gradient:
        weights = cosines.zero_().scatter_(0, pairs[order.places], net / comparisons).to(dtype)
        weights = weights.view(share.total, share.total)
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

    Counting is exact.
    """

    def __init__(self, student: Float[Tensor, " p"], teacher: Float[Tensor, " p"], margin: float) -> None:
        self.teacher_sum = teacher.sum()
        teacher, self.places = teacher.sort(stable=True)  # every process sorts alike
        self.values = student[self.places]
        ordered, places = self.values.sort(stable=True)
        numbers = torch.arange(len(places), dtype=torch.int32, device=places.device)
        self.ranks = torch.empty_like(numbers).scatter_(0, places, numbers)
        self.lower, self.upper = _ties(teacher, numbers)
        # A hinge between a higher p and a lower q is active where student_p - margin < student_q: where q's rank is
        # `reached` of p or more, and p's rank below `reaching` of q.
        self.reached = torch.searchsorted(ordered, ordered - margin, out_int32=True, right=True)
        reaching = numbers.new_zeros(len(numbers) + 1)
        reaching.scatter_add_(0, self.reached.long(), torch.ones_like(numbers))
        self.reaching = reaching.cumsum(0, dtype=torch.int32)[:-1]

    def active(self, some: slice) -> Int[Tensor, "2 p"]:
        """Of some places, how many active hinges would raise the pair there, and how many lower it; 0 for the others."""
        lower, upper, ranks = self.lower[some], self.upper[some], self.ranks[some]
        below, above = self.reached.index_select(0, ranks), self.reaching.index_select(0, ranks)
        first, last = count_lower(self.ranks, torch.stack([lower, upper]), torch.stack([below, above]))
        counts = self.ranks.new_zeros((2, len(self.ranks)), dtype=torch.int64)
        counts[0, some], counts[1, some] = lower - first, above - last
        return counts


def _ties(ordered: Float[Tensor, " p"], places: Int32[Tensor, " p"]) -> tuple[Int32[Tensor, " p"], Int32[Tensor, " p"]]:
    """For each place the first of those whose numbers equal its own, and the one after the last."""
    differs = ordered[1:] != ordered[:-1]
    lower, upper = torch.zeros_like(places), torch.full_like(places, len(places))
    lower[1:] = places[1:] * differs
    upper[:-1] -= (len(places) - places[1:]) * differs
    return lower.cummax(0).values, upper.flip(0).cummin(0).values.flip(0)


def count_lower(
    ranks: Int32[Tensor, " p"], upto: Int32[Tensor, "*queries"], limit: Int32[Tensor, "*queries"]
) -> Int32[Tensor, "*queries"]:
    """How many of the first `upto` ranks, a permutation of 0..p-1, are below `limit`: a wavelet tree, level by level.

    A level holds the ranks in the order of their higher bits, within these as they came: a node is those that share the
    higher bits, and starts where its lowest rank would stand in sorted order. Zeros of the level's bit go left.
    """
    count, places = torch.zeros_like(upto), torch.arange(len(ranks), dtype=torch.int32, device=ranks.device)
    zeros_before = ranks.new_zeros(len(ranks) + 1)
    for level in reversed(range(len(ranks).bit_length())):
        torch.cumsum((ranks >> level) & 1 ^ 1, 0, dtype=torch.int32, out=zeros_before[1:])
        zeros = zeros_before.index_select(0, upto.view(-1)).view_as(upto)
        upto, passed = _descend(limit, upto, zeros, level)
        count += passed
        ranks = torch.empty_like(ranks).scatter_(0, _descend(ranks, places, zeros_before[:-1], level)[0].long(), ranks)
    return count


def _descend(
    numbers: Int32[Tensor, "*any"], places: Int32[Tensor, "*any"], zeros: Int32[Tensor, "*any"], level: int
) -> tuple[Int32[Tensor, "*any"], Int32[Tensor, "*any"]]:
    """Where places in the nodes of some numbers are one level further down, and the zeros there that are left behind.

    `zeros` stand before the places on this level. All nodes before a number's own are full: half of theirs are zeros.
    """
    right = (numbers >> level) & 1
    node = (numbers >> (level + 1)) << (level + 1)
    zeros = zeros - (node >> 1)
    # node + zeros to the left, node + 2^level + the ones before the place to the right; torch.where takes four times as long
    to_right = (places - node).add_(1 << level).sub_(zeros, alpha=2).mul_(right)
    return node.add_(zeros).add_(to_right), zeros.mul_(right)
