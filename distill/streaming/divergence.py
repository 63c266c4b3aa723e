"""KL between softmax rows: the teacher's p against the student's q, over the columns of one matrix.

The gradient of the logits is (q - p) / temperature. Near convergence q - p of two softmaxes has no digits left, so rows
close to their teacher's work with the difference of the logits, delta, less its mean: with w = sum p expm1(delta), q - p =
p (expm1(delta) - w) / (1 + w), and the divergence is sum p (expm1(delta) - delta) + log1p(w) - w. With the mean, which no
softmax sees, 1 + w could be as little as exp(-16): the student's temperature above the teacher's is enough.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from distill.streaming import engine
from distill.streaming.columns import Columns
from distill.streaming.engine import Buffer, UnitRows, exact_dtype, exp_, operator, share_of, tiles, working_dtype

# Elements of a chunk of whole matrix rows, of which a divergence needs two: 16 MB in float32, which stay in a CPU's last
# cache, but 256 rows where these are no more than 256 MB. Of 4,096 x 4,096 x 768, as of its three products: 1.06, with
# chunks of 128 MB 1.12. Of 1,000 x 65,537: 1.00 with 256 rows, 1.07 with 128, 1.21 with 64.
CHUNK, LEAST_ROWS, LARGEST_CHUNK = 2**22, 256, 2**26
# On an H100 three products of 16,384 x 16,384 took 1.27 in chunks of 64 MB, 1.18 of 128 MB, 1.16 of 256 MB.
CUDA_CHUNK = 2**25
# Elements that the passes over a chunk take at once, so that they stay in the cache between passes.
BLOCK = 2**18
# exp(16) p: where |delta| stays below, what p has lost to underflow is below 1e-24 of q.
NEAR = 16.0
# A w, hence a divergence of 1.8, above which a mean that is off by rounding does not count.
LARGE = 5.0


@operator
def cross_kl(
    student: Tensor,
    teacher: Tensor,
    bank: Tensor | None,
    keys: Tensor | None,
    bank_keys: Tensor | None,
    temperature: float,
    teacher_temperature: float,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Whole rows of the matrix, a chunk at a time. 3 products of (b, n, d); 2 without gradient."""
    share, dtype = share_of(student), working_dtype(student)
    rows, twins = UnitRows(student, dtype), UnitRows(teacher, dtype)
    columns = Columns(share, twins, bank, keys, bank_keys)
    size = _chunk_rows(columns.count, student)
    chunks = [Buffer(size * columns.count, student, dtype) for _ in range(2)]
    gradient = student.new_zeros((len(student) if with_gradient else 0, student.shape[1]), dtype=dtype)
    total = student.new_zeros((), dtype=dtype)
    for start, stop in rows.tiles(size):
        teacher_rows = twins.tile(start, stop) / teacher_temperature
        difference = rows.minus(twins, start, stop, 1 / temperature, 1 / teacher_temperature)
        logits, delta = (chunk(stop - start, columns.count) for chunk in chunks)
        for tile in columns.tiles(engine.product_columns(student)):
            piece = logits[:, tile.place]
            torch.mm(teacher_rows, tile.rows.T, out=piece)
            torch.mm(difference, tile.rows.T, out=delta[:, tile.place])
            columns.left_out(slice(start, stop), tile).fill_(piece)
        near = torch.linalg.vector_norm(difference, dim=-1, keepdim=True) <= NEAR  # no |delta| is larger
        total += divergence(logits, delta, near)
        if with_gradient:
            for tile in columns.tiles(engine.product_columns(student)):
                gradient[start:stop].addmm_(delta[:, tile.place], tile.rows)
    if with_gradient:
        rows.through_norms(gradient.div_(temperature * share.total))
    return share.sum(total) / share.total, gradient


@operator
def gram_kl(
    student: Tensor, teacher: Tensor, temperature: float, teacher_temperature: float, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Student x student against teacher x teacher, twins left out. Row i also stands in every other row's softmax.

    Both matrices are symmetric, so the gradient of own rows needs only own rows of them, and of the others' rows two
    numbers each: 3 products of (b, g, d) and (b, g, e) in all; where own rows do not fit in a chunk, the 2 before the
    gradient are done again. One more where student and teacher are near each other.
    """
    grams = _Grams(student, teacher, temperature, teacher_temperature)
    share, rows = grams.share, grams.rows
    total = student.new_zeros((), dtype=rows.dtype)
    sums = student.new_empty((len(student), 2), dtype=rows.dtype)
    for start, stop in grams.chunks():
        logits, delta = grams.fill(start, stop)
        for a, b in _blocks(logits):
            values, sums[start + a : start + b] = _row_sums(logits[a:b], delta[a:b], grams.near)
            total += values.sum()
    gradient = student.new_zeros((len(student) if with_gradient else 0, student.shape[1]), dtype=rows.dtype)
    if with_gradient:
        everyone = share.everyone(sums).T.contiguous()
        for start, stop in grams.chunks():
            logits, delta = grams.fill(start, stop)
            for a, b in _blocks(logits):
                _both_directions(logits[a:b], delta[a:b], sums[start + a : start + b], everyone, grams.near)
            for first, last in grams.students.tiles(engine.product_columns(student)):
                gradient[start:stop].addmm_(delta[:, first:last], grams.students.tile(first, last))
        rows.through_norms(gradient.div_(temperature * share.total))
    return share.sum(total) / share.total, gradient


class _Grams:
    """Own rows of the teacher's logits and of the student's minus those, a chunk at a time."""

    def __init__(self, student: Tensor, teacher: Tensor, temperature: float, teacher_temperature: float):
        dtype = working_dtype(student)
        self.share = share_of(student)
        self.rows, self.twins = UnitRows(student, dtype), UnitRows(teacher, dtype)
        self.students, self.teachers = self.share.everyones(self.rows), self.share.everyones(self.twins)
        self.temperatures = temperature, teacher_temperature
        self.near = self._all_are_near()
        whole = (
            len(student) * self.share.total <= LARGEST_CHUNK // 2
        )  # then the gradient finds what the sums were made of
        self.size = max(len(student), 1) if whole else _chunk_rows(self.share.total, student)
        self._memory = [Buffer(self.size * self.share.total, student, dtype) for _ in range(2)]
        self._filled: tuple[int, int] | None = None

    def chunks(self) -> Iterator[tuple[int, int]]:
        return tiles(len(self.rows), self.size)

    def fill(self, start: int, stop: int) -> tuple[Float[Tensor, "t g"], Float[Tensor, "t g"]]:
        """(logits of the teacher, difference). They stay as they are until the next call, or for ever if one chunk holds all."""
        logits, delta = (memory(stop - start, self.share.total) for memory in self._memory)
        if self._filled != (start, stop):
            self._filled = start, stop
            for first, last in self.students.tiles(engine.product_columns(self.students.raw)):
                self._fill_tile(slice(start, stop), slice(first, last), logits[:, first:last], delta[:, first:last])
            logits.diagonal(self.share.start + start).fill_(-torch.inf)
        return logits, delta

    def _fill_tile(self, rows: slice, columns: slice, logits: Tensor, delta: Tensor) -> None:
        temperature, teacher_temperature = self.temperatures
        own, others = self.twins.tile(rows.start, rows.stop), self.teachers.tile(columns.start, columns.stop)
        torch.addmm(logits, own, others.T, beta=0, alpha=1 / teacher_temperature, out=logits)
        if not self.near:
            own, others = self.rows.tile(rows.start, rows.stop), self.students.tile(columns.start, columns.stop)
            torch.addmm(logits, own, others.T, beta=-1, alpha=1 / temperature, out=delta)
            return
        mine, theirs = (
            self._difference_and_sum(self.rows, self.twins, rows),
            self._difference_and_sum(self.students, self.teachers, columns),
        )
        torch.addmm(delta, mine[0], theirs[1].T, beta=0, alpha=0.5 / temperature, out=delta)
        torch.addmm(delta, mine[1], theirs[0].T, alpha=0.5 / temperature, out=delta)

    def _difference_and_sum(self, students: UnitRows, teachers: UnitRows, part: slice) -> tuple[Tensor, Tensor]:
        return students.minus(teachers, part.start, part.stop), students.minus(
            teachers, part.start, part.stop, 1.0, -1.0
        )

    def _all_are_near(self) -> bool:
        """Whether no |difference| of logits is above NEAR. Not asked on a GPU, which would have to be waited for."""
        temperature, teacher_temperature = self.temperatures
        same_space = self.rows.raw.shape[1] == self.twins.raw.shape[1] and temperature == teacher_temperature
        if not same_space or self.rows.raw.is_cuda:
            return False
        distances = [
            torch.linalg.vector_norm(self.rows.minus(self.twins, start, stop), dim=-1)
            for start, stop in self.rows.tiles()
        ]
        largest = self.share.max(torch.cat([self.rows.raw.new_zeros(1, dtype=self.rows.dtype), *distances]).max())
        return bool(2 * largest / temperature <= NEAR)


def _row_sums(
    logits: Float[Tensor, "b n"], delta: Float[Tensor, "b n"], near: bool
) -> tuple[Tensor, Float[Tensor, "b 2"]]:
    """The divergence of each row, and its two log-sum-exps; if near, of the student's what it is more than the teacher's."""
    if not near and (kernels := engine.kernels_for(logits)):
        nowhere = torch.zeros_like(logits[:, :1], dtype=torch.bool)
        value, sums = kernels.divergence_rows(logits, delta, nowhere, into_delta=False).split([1, 2], -1)
        return value.clamp(min=0), sums
    p, teacher_sum = softmax_(logits.clone())
    if not near:
        _, student_sum = softmax_(logits + delta)
        value = student_sum - teacher_sum - (p * delta).sum(-1, keepdim=True)
        return value.clamp_(min=0), torch.cat([teacher_sum, student_sum], -1)
    mean = _mean(p, delta)
    centred = delta - mean
    growth = torch.expm1(centred)
    w = (p * growth).sum(-1, keepdim=True)
    value = _near_divergence((p * growth.sub_(centred)).sum(-1, keepdim=True), w)
    return value, torch.cat([teacher_sum, w.log1p() + mean], -1)


def _both_directions(
    logits: Float[Tensor, "b g"],
    delta: Float[Tensor, "b g"],
    rows: Float[Tensor, "b 2"],
    columns: Float[Tensor, "2 g"],
    near: bool,
) -> None:
    """delta becomes (q - p) of the rows plus that of the columns."""
    if not near and (kernels := engine.kernels_for(logits)):
        kernels.both_differences_(logits, delta, rows, columns)
        return
    p, p_of_columns = exp_(logits - rows[:, :1]), exp_(logits - columns[:1])
    if not near:
        student = logits + delta
        torch.sub(exp_(student - rows[:, 1:]), p, out=delta)
        delta.add_(exp_(student - columns[1:])).sub_(p_of_columns)
        return
    of_row = p.mul_(torch.expm1(delta - rows[:, 1:]))
    torch.addcmul(of_row, p_of_columns, delta.sub_(columns[1:]).expm1_(), out=delta)


def divergence(
    logits: Float[Tensor, "b n"], delta: Float[Tensor, "b n"], near: Bool[Tensor, "b 1"]
) -> Float[Tensor, ""]:
    """The sum over rows of KL(softmax(logits) || softmax(logits + delta)); delta becomes q - p, logits are lost.

    -inf in `logits` leaves a column out of its row; a row of nothing else counts 0.
    """
    if kernels := engine.kernels_for(logits):
        value, _, w = kernels.divergence_rows(logits, delta, near, into_delta=True).split(1, -1)
        return torch.where(near, _near_divergence(value, w), value.clamp(min=0)).sum()
    total = logits.new_zeros(())
    for start, stop in _blocks(logits):
        total += _block(logits[start:stop], delta[start:stop], near[start:stop])
    return total


def _chunk_rows(columns: int, rows: Tensor) -> int:
    wanted = (CUDA_CHUNK if rows.is_cuda else CHUNK) // max(columns, 1)
    least = min(LEAST_ROWS, LARGEST_CHUNK // max(columns, 1))
    return min(max(wanted, least, 1), max(len(rows), 1))


def _blocks(chunk: Float[Tensor, "b n"]) -> Iterator[tuple[int, int]]:
    size = len(chunk) if engine.kernels_for(chunk) else BLOCK // max(chunk.shape[1], 1)  # a kernel's pass is one
    return tiles(len(chunk), max(1, size))


def _block(logits: Float[Tensor, "b n"], delta: Float[Tensor, "b n"], near: Bool[Tensor, "b 1"]) -> Float[Tensor, ""]:
    if near.is_cuda:  # both, and a choice on the device: asking it which are near would wait for it
        far = delta.clone()
        close, apart = _near(logits.clone(), delta), _far(logits, far)
        delta.copy_(torch.where(near, delta, far))
        return torch.where(near, close, apart).sum()
    if bool(near.all()):
        return _near(logits, delta).sum()
    return _far(logits, delta).sum()


def _near(logits: Float[Tensor, "b n"], delta: Float[Tensor, "b n"]) -> Float[Tensor, "b 1"]:
    p, _ = softmax_(logits)
    growth = torch.expm1(delta.sub_(_mean(p, delta)))
    w = (p * growth).sum(-1, keepdim=True)
    value = _near_divergence((p * delta.sub_(growth)).sum(-1, keepdim=True).neg_(), w)
    torch.mul(p, growth.sub_(w), out=delta)
    delta.div_(1 + w)
    return value


def _far(logits: Float[Tensor, "b n"], delta: Float[Tensor, "b n"]) -> Float[Tensor, "b 1"]:
    student = logits + delta
    p, teacher_sum = softmax_(logits)
    q, student_sum = softmax_(student)
    value = student_sum - teacher_sum - (p * delta).sum(-1, keepdim=True)
    torch.sub(q, p, out=delta)
    return value.clamp_(min=0)


def _mean(p: Float[Tensor, "b n"], delta: Float[Tensor, "b n"]) -> Float[Tensor, "b 1"]:
    """Need not be exact: a softmax does not change with what is taken off its logits."""
    return torch.linalg.vecdot(p, delta).unsqueeze(-1)


def _near_divergence(excess: Float[Tensor, "b 1"], w: Float[Tensor, "b 1"]) -> Float[Tensor, "b 1"]:
    """From sum p (expm1(delta) - delta) and w. It is log(1 + w) less the mean of delta, which is 0 but for rounding: where w
    is small, that counts, and where it is large, w takes the digits of the rest.
    """
    exact = w.to(exact_dtype(w))
    logarithm = exact.log1p()
    return torch.where(exact > LARGE, logarithm, excess + (logarithm - exact)).to(w.dtype).clamp_(min=0)


def softmax_(logits: Float[Tensor, "b n"]) -> tuple[Float[Tensor, "b n"], Float[Tensor, "b 1"]]:
    """Rows become their softmax, in place; the second is their log-sum-exp. A row of -inf becomes 0, and counts 0."""
    highest = logits.amax(-1, keepdim=True)
    is_empty = highest == -torch.inf
    total = exp_(logits.sub_(highest.masked_fill_(is_empty, 0.0))).sum(-1, keepdim=True)
    logits.mul_(total.masked_fill(is_empty, 1.0).reciprocal())
    return logits, (total.log() + highest).masked_fill(is_empty, 0.0)
