"""Large batches through small ones: a loss that couples the whole batch, with only a few texts in memory at once.

Vectors are computed without a graph, a micro-batch at a time; the loss is computed once, on all of them; then each
micro-batch is computed again, with the same dropout, and takes its rows of the gradient back into the model. A second
forward pass buys the memory of a micro-batch instead of the batch's. Gao et al. 2021 (GradCache, arXiv:2101.06983).
"""

import gc
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from distill.ahead import sent
from distill.errors import ResourceError

log = logging.getLogger(__name__)

Result = TypeVar("Result")

# Of the CPU's allocator, of cuBLAS that makes a handle, and of CUDA itself, which have no exception of their own.
_NO_MEMORY = re.compile(
    r"DefaultCPUAllocator: (can't allocate memory|not enough memory)|CUBLAS_STATUS_ALLOC_FAILED|CUDA error: out of memory"
)


class OutOfMemory(Exception):
    """A micro-batch did not fit. Of what was there before, only gradients and the random state have changed."""


def backward_in_micro_batches(
    encode: Callable[[Int[Tensor, " k"]], Float[Tensor, "k d"]],
    lengths: Int[Tensor, " b"],
    loss_of_vectors: Callable[[Float[Tensor, "b d"]], Float[Tensor, ""]],
    *,
    micro_batch: int,
    any_process: Callable[[bool], bool] = bool,
) -> Float[Tensor, ""]:
    """Add the gradients of loss_of_vectors(encode(all rows)) to the parameters', `micro_batch` rows at a time; return the loss.

    Equals `loss_of_vectors(encode(torch.arange(b))).backward()`. `encode` is given rows in any order, on the CPU; `lengths`
    is what each costs (its tokens): rows of similar length run together. Cost: one more forward pass, unless all fit at once.

    Randomness in `encode` follows one draw from the global generator, which therefore stands at the same place afterwards
    whatever the micro-batch was. OutOfMemory if the encoder does not fit (see `MicroBatch`); what the loss raises is passed on.

    With several processes every process calls this, also one without rows. `encode` then runs the module itself, not its DDP
    wrapper: the wrapper's forward has collectives of its own, also under no_sync, and processes with different numbers of
    micro-batches would wait for each other forever. `exchange_gradients` after a step's last batch has DDP average what is
    there. `any_process` tells all of them that one ran out of memory: `distributed.any_process`.
    """
    pieces = _cut(lengths, micro_batch)
    seed, whole = int(torch.randint(2**62, ())), len(pieces) == 1

    def encoded(number: int) -> Tensor:
        with _seeded(seed + number):
            return encode(pieces[number])

    def forward() -> list[Tensor]:
        with torch.set_grad_enabled(whole):
            return [encoded(number) for number in range(len(pieces))]

    def backward() -> None:
        for number, gradient in enumerate(gradients):
            (found[0] if whole else encoded(number)).backward(gradient)

    found = _unless_memory_runs_out(forward, any_process)
    vectors = torch.cat(found).detach()[sent(torch.cat(pieces).argsort(), found[0].device)].requires_grad_()
    value = loss_of_vectors(vectors)
    value.backward()
    gradient = torch.zeros_like(vectors) if vectors.grad is None else vectors.grad
    gradients = [gradient[sent(rows, gradient.device)] for rows in pieces]
    torch.clear_autocast_cache()  # under a caller's autocast it holds casts of the weights that were made without a graph
    _unless_memory_runs_out(backward, any_process)
    return value.detach()


def exchange_gradients(model: nn.Module, *inputs: object) -> None:
    """DDP's average over processes of the gradients as they are: a backward pass that adds nothing to them.

    `model` is the DDP wrapper; `inputs` any small batch that it runs. Cost: that batch, and the one all-reduce of a step.
    """
    with _seeded(0):
        nothing = model(*inputs)[:0]
    nothing.sum().backward()


class MicroBatch:
    """How many rows fit at once, found as a run goes: halved when memory runs out, never raised again.

        fitting = MicroBatch(256)
        value = fitting.run(lambda size: backward_in_micro_batches(..., micro_batch=size), undo=optimizer.zero_grad)

    The loss is the whole batch's at any size.
    """

    def __init__(self, size: int, report: Callable[[str], object] = log.warning):
        self.size, self._report = size, report

    def run(self, attempt: Callable[[int], Result], *, undo: Callable[[], object], most: int | None = None) -> Result:
        """attempt(size): again after `undo()`, with half the size and the same random state, while it raises OutOfMemory.

        `undo` clears what the step has added to the gradients. No process has more than `most` rows: a larger size is
        as good as that. ResourceError if one row alone does not fit.
        """
        size, state = min(self.size, most or self.size), _random_state()
        while True:
            try:
                return attempt(size)
            except OutOfMemory as error:
                cause = str(error)
            size = self.size = self._half(size, cause)
            undo()
            _free_memory()
            _restore_random(state)

    def _half(self, size: int, cause: str) -> int:
        if size == 1:
            raise ResourceError(
                f"one text alone does not fit in memory: {cause}. Cut texts shorter (max_length), train in bf16, or take a smaller model."
            )
        self._report(
            f"out of memory with {size} texts at once; on with {size // 2}, the loss is still the whole batch's"
        )
        return size // 2


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator said no: a device's own error, or a plain RuntimeError."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and bool(_NO_MEMORY.search(str(error)))


def _cut(lengths: Int[Tensor, " b"], micro_batch: int) -> list[Int[Tensor, " k"]]:
    """Rows, the longest first, in pieces of equal size: what does not fit shows at once, and padding is cheap."""
    if micro_batch < 1:
        raise ValueError(f"micro_batch is 1 or more rows, got {micro_batch}.")
    count = -(-len(lengths) // micro_batch)
    if count <= 1:
        return [torch.arange(len(lengths))]
    return list(lengths.cpu().argsort(descending=True, stable=True).tensor_split(count))


def _unless_memory_runs_out(action: Callable[[], Result], any_process: Callable[[bool], bool]) -> Result:
    """What `action` returns; OutOfMemory on every process if memory runs out on one."""
    result, cause = None, ""
    try:
        result = action()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        cause = str(error)  # nothing more: the error's frames hold what has to be freed
    if any_process(bool(cause)):
        raise OutOfMemory(cause or "another process ran out of memory")
    return result  # type: ignore[return-value]


def _devices() -> list[int]:
    return list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=_devices()):
        if torch.accelerator.is_available():
            torch.manual_seed(seed)
        else:  # 1 us instead of 130, which a static student would notice
            torch.default_generator.manual_seed(seed)
        yield


def _random_state() -> tuple[Tensor, list[Tensor]]:
    return torch.get_rng_state(), [torch.cuda.get_rng_state(device) for device in _devices()]


def _restore_random(state: tuple[Tensor, list[Tensor]]) -> None:
    torch.set_rng_state(state[0])
    for device, value in enumerate(state[1]):
        torch.cuda.set_rng_state(value, device)


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
