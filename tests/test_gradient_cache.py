"""A batch in micro-batches has the loss and the gradients of the whole batch, and memory changes neither."""

import logging
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from torch import Tensor, nn

from distill import losses
from distill.encoder import Encoder
from distill.errors import ResourceError
from distill.training import gradient_cache
from distill.training.gradient_cache import MicroBatch, OutOfMemory, backward_in_micro_batches, is_out_of_memory

LOSSES: dict[str, Callable[[], nn.Module]] = {
    "CrossKL": lambda: losses.CrossKL(temperature=0.1),
    # At 0.1 the float32 gradient of the whole batch is itself off by 1.1e-6.
    "CrossContrastive": lambda: losses.CrossContrastive(temperature=0.5),
    "GramMSE": losses.GramMSE,
    "WeightedSum": lambda: losses.WeightedSum({"kl": losses.CrossKL(temperature=0.1), "gram": losses.GramMSE()}),
}
WIDTH, ROWS = 6, 10
LENGTHS = torch.tensor([3, 9, 1, 4, 4, 12, 2, 7, 1, 5])


def mlp(dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        layers = nn.Linear(WIDTH, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, WIDTH)
    return nn.Sequential(*layers).to(dtype)


def drawn(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Inputs and teacher vectors."""
    both = torch.randn(2, ROWS, WIDTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)
    return both[0], both[1]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


def error(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The norm of the difference of two gradients, as a share of the norm of the other."""
    assert one.keys() == other.keys()
    norm = torch.cat([value.flatten() for value in other.values()]).norm()
    return float(torch.cat([(one[name] - other[name]).flatten() for name in one]).norm() / norm)


def assert_same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


class Recorded:
    """Encodes rows, and remembers what it was asked for and what it gave."""

    def __init__(self, model: Callable[[Tensor], Tensor], inputs: Tensor):
        self.model, self.inputs = model, inputs
        self.calls: list[tuple[list[int], Tensor]] = []

    def __call__(self, rows: Tensor) -> Tensor:
        vectors = self.model(self.inputs[rows])
        self.calls.append((rows.tolist(), vectors.detach()))
        return vectors


def whole(model: nn.Module, loss: nn.Module, inputs: Tensor, teacher: Tensor) -> Tensor:
    """What anybody would write."""
    value = loss(model(inputs), teacher)
    value.backward()
    return value.detach()


# Equality


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-10)], ids=str)
@pytest.mark.parametrize("micro_batch", [1, 3, 9, ROWS, 50])
@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradients_are_those_of_the_whole_batch(
    name: str, micro_batch: int, dtype: torch.dtype, tolerance: float
) -> None:
    loss, (inputs, teacher) = LOSSES[name](), drawn(dtype)
    one, other = mlp(dtype), mlp(dtype)
    expected = whole(one, loss, inputs, teacher)
    encode = Recorded(other, inputs)
    value = backward_in_micro_batches(encode, LENGTHS, lambda s: loss(s, teacher), micro_batch=micro_batch)
    assert not value.requires_grad
    assert abs(float(value / expected) - 1) <= tolerance
    assert error(gradients(other), gradients(one)) <= tolerance
    if micro_batch >= ROWS:
        assert value == expected
        assert_same_bits(gradients(other), gradients(one))
    passes = 1 if micro_batch >= ROWS else 2
    assert len(encode.calls) == passes * -(-ROWS // micro_batch)
    assert max(len(rows) for rows, _ in encode.calls) <= micro_batch


def test_losses_of_the_micro_batches_are_another_objective() -> None:
    inputs, teacher = drawn()
    for name, make in LOSSES.items():
        loss, one, other = make(), mlp(), mlp()
        whole(one, loss, inputs, teacher)
        for rows in torch.arange(ROWS).split(5):
            (loss(other(inputs[rows]), teacher[rows]) / 2).backward()
        assert error(gradients(other), gradients(one)) > 0.05, name


def test_gradients_are_added_to_those_there_are() -> None:
    loss, (inputs, teacher) = losses.GramMSE(), drawn(torch.float64)
    one, other = mlp(torch.float64), mlp(torch.float64)
    for rows in torch.arange(ROWS).split([6, 4]):
        (loss(one(inputs[rows]), teacher[rows]) * len(rows) / ROWS).backward()
        some, twins, weight = inputs[rows], teacher[rows], len(rows) / ROWS
        backward_in_micro_batches(
            Recorded(other, some), LENGTHS[rows], lambda s, t=twins, w=weight: w * loss(s, t), micro_batch=3
        )
    assert error(gradients(other), gradients(one)) <= 1e-10


def test_a_loss_may_learn_too() -> None:
    inputs, teacher = drawn()
    scale = nn.Parameter(torch.tensor(2.0))
    model = mlp()
    backward_in_micro_batches(
        Recorded(model, inputs), LENGTHS, lambda s: scale * losses.gram_mse(s, teacher), micro_batch=3
    )
    assert scale.grad == losses.gram_mse(model(inputs), teacher)


def test_rows_of_similar_length_run_together_the_longest_first() -> None:
    encode = Recorded(mlp(), drawn()[0])
    backward_in_micro_batches(encode, LENGTHS, lambda s: s.square().sum(), micro_batch=4)
    assert [rows for rows, _ in encode.calls] == 2 * [[5, 1, 7, 9], [3, 4, 0], [6, 2, 8]]


def test_no_rows_and_no_micro_batch() -> None:
    model = mlp()
    value = backward_in_micro_batches(
        lambda rows: model(drawn()[0][rows]), LENGTHS[:0], lambda s: s.sum(), micro_batch=4
    )
    assert value == 0
    assert all(not gradient.any() for gradient in gradients(model).values())
    with pytest.raises(ValueError, match="micro_batch is 1 or more rows, got 0"):
        backward_in_micro_batches(Recorded(model, drawn()[0]), LENGTHS, lambda s: s.sum(), micro_batch=0)


@pytest.fixture
def encoder(tiny_bert: Path) -> Encoder:
    return runs.student("layers", runs.teacher(tiny_bert), dropout=0.1).train()


def encoded(encoder: Encoder, count: int = 24) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    tokens = encoder.tokenize(runs.texts(count, longest=25)).tokens
    return lambda rows: encoder(tokens.rows(rows)), tokens.lengths


@pytest.mark.parametrize("micro_batch", [1, 5, 24])
def test_an_encoder_which_groups_by_length_itself(encoder: Encoder, micro_batch: int) -> None:
    encoder.eval()
    encode, lengths = encoded(encoder)
    teacher = torch.randn(24, encoder.width)
    expected = losses.cross_kl(encode(torch.arange(24)), teacher, temperature=0.1)
    expected.backward()
    one = gradients(encoder)
    encoder.zero_grad()
    value = backward_in_micro_batches(
        encode, lengths, lambda s: losses.cross_kl(s, teacher, temperature=0.1), micro_batch=micro_batch
    )
    torch.testing.assert_close(value, expected.detach(), rtol=1e-6, atol=0)
    assert error(gradients(encoder), one) <= 1e-6


@pytest.mark.parametrize("micro_batch", [3, 5])
def test_a_callers_autocast_reaches_all_weights_in_both_passes(micro_batch: int) -> None:
    inputs, teacher = drawn()
    one, other = mlp(), mlp()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses.gram_mse(one(inputs), teacher).backward()
        encode = Recorded(other, inputs)
        backward_in_micro_batches(encode, LENGTHS, lambda s: losses.gram_mse(s, teacher), micro_batch=micro_batch)
    assert error(gradients(other), gradients(one)) <= 2e-2
    assert_same_passes(encode)


# Dropout


def assert_same_passes(encode: Recorded) -> None:
    first, second = encode.calls[: len(encode.calls) // 2], encode.calls[len(encode.calls) // 2 :]
    for (rows, vectors), (again, others) in zip(first, second, strict=True):
        assert rows == again
        assert torch.equal(vectors, others)


def test_dropout_of_the_first_pass_is_that_of_the_second(encoder: Encoder) -> None:
    tokens = encoder.tokenize(runs.texts(24, longest=25)).tokens
    encode = Recorded(lambda rows: encoder(tokens.rows(rows)), torch.arange(24))
    backward_in_micro_batches(encode, tokens.lengths, lambda s: s.square().sum(), micro_batch=5)
    assert_same_passes(encode)
    once, twice = encoder(tokens), encoder(tokens)
    assert not torch.equal(once, twice)


def test_without_the_replay_the_passes_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradient_cache, "_seeded", lambda seed: nullcontext())
    encode = Recorded(mlp(dropout=0.5), drawn()[0])
    backward_in_micro_batches(encode, LENGTHS, lambda s: s.square().sum(), micro_batch=5)
    with pytest.raises(AssertionError):
        assert_same_passes(encode)


@pytest.mark.parametrize("name", LOSSES)
def test_with_dropout_the_gradient_is_that_of_the_graph_kept_whole(name: str) -> None:
    loss, (inputs, teacher) = LOSSES[name](), drawn(torch.float64)
    one, other = mlp(torch.float64, dropout=0.3), mlp(torch.float64, dropout=0.3)
    torch.manual_seed(8)
    value = backward_in_micro_batches(Recorded(other, inputs), LENGTHS, lambda s: loss(s, teacher), micro_batch=4)
    torch.manual_seed(8)
    seed, pieces, parts = int(torch.randint(2**62, ())), gradient_cache._cut(LENGTHS, 4), []
    for number, rows in enumerate(pieces):
        with gradient_cache._seeded(seed + number):
            parts.append(one(inputs[rows]))
    expected = loss(torch.cat(parts)[torch.cat(pieces).argsort()], teacher)
    expected.backward()
    assert value == pytest.approx(expected.item(), rel=1e-12)
    assert error(gradients(other), gradients(one)) <= 1e-12


def test_the_random_state_afterwards_does_not_depend_on_the_micro_batch() -> None:
    states = []
    for micro_batch in (1, 3, ROWS):
        torch.manual_seed(5)
        encode = Recorded(mlp(dropout=0.5), drawn()[0])
        backward_in_micro_batches(encode, LENGTHS, lambda s: s.square().sum(), micro_batch=micro_batch)
        states.append(torch.get_rng_state())
    assert torch.equal(states[0], states[1])
    assert torch.equal(states[0], states[2])
    torch.manual_seed(5)
    assert not torch.equal(states[0], torch.get_rng_state())


# Memory


class Held:
    """A tensor that autograd saved; how many bytes are held at once is counted."""

    now = most = 0

    def __init__(self, tensor: Tensor):
        self.tensor, self.bytes = tensor.detach(), tensor.nbytes  # with its graph it would hold itself
        Held.now += self.bytes
        Held.most = max(Held.most, Held.now)

    def __del__(self) -> None:
        Held.now -= self.bytes


def most_saved(encoder: Encoder, micro_batch: int) -> int:
    Held.now = Held.most = 0
    encode, lengths = encoded(encoder, 64)
    with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
        backward_in_micro_batches(encode, lengths, lambda s: s.square().sum(), micro_batch=micro_batch)
    return Held.most


def test_what_autograd_holds_at_once_shrinks_with_the_micro_batch(encoder: Encoder) -> None:
    everything, quarter, few = (most_saved(encoder, size) for size in (64, 16, 4))
    weights = sum(value.nbytes for value in encoder.parameters())
    assert quarter - weights < 0.5 * (everything - weights)
    assert few < 0.5 * quarter


ALLOCATOR = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."
NO_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError(ALLOCATOR),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: out of memory"),
]


def test_which_errors_mean_no_memory() -> None:
    assert all(map(is_out_of_memory, NO_MEMORY))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)
    assert is_out_of_memory(caught.value)
    others = [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), MemoryError(), ValueError(ALLOCATOR)]
    assert not any(map(is_out_of_memory, others))


class Small(nn.Module):
    """A model on a machine too small for more than `most` rows: in the pass without a graph, in that with one, or backward."""

    def __init__(self, model: nn.Module, most: int, where: str, error: Exception = NO_MEMORY[0]):
        super().__init__()
        self.model, self.most, self.where, self.error = model, most, where, error

    def forward(self, inputs: Tensor) -> Tensor:
        vectors = self.model(inputs)
        self.refuse("with" if torch.is_grad_enabled() else "without", len(inputs))
        if vectors.requires_grad:
            inner = vectors.grad_fn.next_functions[1][0]  # by then the last layer has its gradient already
            inner.register_prehook(lambda gradient: self.refuse("backward", len(inputs)))
        return vectors

    def refuse(self, where: str, rows: int) -> None:
        if where == self.where and rows > self.most:
            raise self.error


def stepped(model: nn.Module, size: int, **options: Any) -> tuple[Tensor, int, list[str]]:
    """The loss, the micro-batch that fitted, and what was said."""
    inputs, teacher = drawn()
    said: list[str] = []
    fitting = MicroBatch(size, said.append)
    value = fitting.run(
        lambda micro_batch: backward_in_micro_batches(
            lambda rows: model(inputs[rows]),
            LENGTHS,
            lambda vectors: losses.gram_mse(vectors, teacher),
            micro_batch=micro_batch,
        ),
        **{"undo": model.zero_grad, **options},
    )
    return value, fitting.size, said


@pytest.mark.parametrize("problem", NO_MEMORY, ids=["device", "linux", "windows", "cublas", "cuda"])
@pytest.mark.parametrize(
    ("where", "size"), [("with", ROWS), ("backward", ROWS), ("without", 8), ("with", 8), ("backward", 8)]
)
def test_a_step_that_ran_out_is_done_again_as_if_the_micro_batch_had_been_small(
    where: str, size: int, problem: Exception
) -> None:
    one, other = mlp(dropout=0.3), mlp(dropout=0.3)
    torch.manual_seed(2)
    value, found, said = stepped(Small(one, 2, where, problem), size)
    after = torch.get_rng_state()
    assert (found, len(said)) == (2, 2)
    assert (
        said[0] == f"out of memory with {size} texts at once; on with {size // 2}, the loss is still the whole batch's"
    )
    torch.manual_seed(2)
    assert stepped(other, 2) == (value, 2, [])
    assert_same_bits(gradients(one), gradients(other))
    assert torch.equal(after, torch.get_rng_state())


def test_without_undo_the_first_attempt_would_stay_in_the_gradients() -> None:
    one, other = mlp(), mlp()
    stepped(Small(one, 2, "backward"), ROWS, undo=lambda: None)
    stepped(other, 2)
    assert error(gradients(one), gradients(other)) > 0.1


def test_no_more_rows_than_there_are_are_tried_and_a_size_that_fits_stays() -> None:
    assert stepped(mlp(), 1000, most=ROWS) == (stepped(mlp(), ROWS)[0], 1000, [])
    assert stepped(Small(mlp(), 5, "with"), 1000, most=ROWS)[1] == 5


def test_one_line_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    model, fitting = Small(mlp(), 5, "with"), MicroBatch(ROWS)
    inputs = drawn()[0]
    for _ in range(3):
        fitting.run(
            lambda size: backward_in_micro_batches(
                lambda rows: model(inputs[rows]), LENGTHS, lambda s: s.square().sum(), micro_batch=size
            ),
            undo=model.zero_grad,
        )
    assert [(record.levelno, record.args) for record in caplog.records] == [(logging.WARNING, ())]


def test_a_text_that_does_not_fit_alone_is_an_error_with_a_way_out() -> None:
    with pytest.raises(ResourceError, match=r"one text alone does not fit in memory: CUDA out of memory.*max_length"):
        stepped(Small(mlp(), 0, "with"), ROWS)


@pytest.mark.parametrize("where", ["without", "with", "backward"])
def test_other_errors_and_those_of_the_loss_are_not_ours(where: str) -> None:
    with pytest.raises(RuntimeError, match=r"^other$"):
        stepped(Small(mlp(), 2, where, RuntimeError("other")), 8)

    def greedy(vectors: Tensor) -> Tensor:
        raise NO_MEMORY[0]

    with pytest.raises(torch.OutOfMemoryError):
        backward_in_micro_batches(Recorded(mlp(), drawn()[0]), LENGTHS, greedy, micro_batch=3)


def test_nothing_of_the_attempt_is_held_when_the_next_begins(encoder: Encoder) -> None:
    """What autograd saved before memory ran out is free again: the error does not keep it."""
    encode, lengths = encoded(encoder)
    held: list[int] = []
    Held.now = Held.most = 0

    def attempt(size: int) -> Tensor:
        held.append(Held.now)
        return backward_in_micro_batches(refusing, lengths, lambda s: s.square().sum(), micro_batch=size)

    def refusing(rows: Tensor) -> Tensor:
        vectors = encode(rows)
        if torch.is_grad_enabled() and len(rows) > 6:
            raise torch.OutOfMemoryError("CUDA out of memory.")  # not NO_MEMORY: it would keep its own traceback
        return vectors

    with torch.autograd.graph.saved_tensors_hooks(Held, lambda each: each.tensor):
        MicroBatch(24).run(attempt, undo=encoder.zero_grad)
    assert Held.most > 0
    assert held == [0, 0, 0]


def test_memory_of_another_process_counts_too() -> None:
    inputs = drawn()[0]
    with pytest.raises(OutOfMemory, match="another process"):
        backward_in_micro_batches(
            Recorded(mlp(), inputs), LENGTHS, lambda s: s.sum(), micro_batch=3, any_process=lambda mine: True
        )
