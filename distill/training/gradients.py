"""A step's gradients over processes: in micro-batches that fit in memory, exchanged once.

DDP exchanges gradients while they are computed. A process that runs out of memory in between cannot begin again, because
the others wait for it in the exchange. Until every process has once run as many tokens, the student therefore runs
without DDP, processes agree on whether memory was enough, and DDP exchanges what is there afterwards.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from distill import distributed
from distill.errors import ResourceError
from distill.modules import Tokens
from distill.training.gradient_cache import MicroBatch, backward_in_micro_batches, exchange_gradients


@dataclass(frozen=True)
class BatchPart:
    """This process's part of a global batch: `count` texts, at most `most` on any process, and the loss of their vectors."""

    tokens: Tokens  # of one text if the part has none
    count: int
    most: int
    loss: Callable[[Float[Tensor, "b d"]], Float[Tensor, ""]]

    @property
    def token_count(self) -> int:
        return int(self.tokens.lengths[: self.count].sum())

    def encode(self, model: nn.Module, rows: Tensor) -> Float[Tensor, "k d"]:
        """Without rows one text is run all the same, so that the vectors hang together with every parameter."""
        return model(self.tokens.rows(rows if len(rows) else torch.tensor([0])))[: len(rows)]


class StepGradients:
    """Adds gradients to a student's parameters. `model` is what Accelerate made of it: DDP around it, or itself."""

    def __init__(self, student: nn.Module, model: nn.Module, *, micro_batch: int, device: torch.device):
        self.student, self.model = student, model
        self.micro_batch = MicroBatch(micro_batch, report=_say)
        self.any_process = partial(distributed.any_process, device=device)
        self._fitted_tokens: int | None = None  # the first step does not count: the optimizer takes its memory after it

    def add(self, parts: Sequence[BatchPart]) -> Float[Tensor, ""]:
        """Gradients of the sum of the parts' losses, and that sum. The gradients there were are lost if memory runs out."""
        most = max(part.most for part in parts)
        return self.micro_batch.run(partial(self._add, parts), undo=self.student.zero_grad, most=most)

    def _add(self, parts: Sequence[BatchPart], micro_batch: int) -> Float[Tensor, ""]:
        *before, last = parts
        values = [self._backward(part, self.student, micro_batch, self.any_process) for part in before]
        if distributed.world_size() > 1 and self._surely_fits(last, micro_batch):
            values.append(self._backward(last, self.model, micro_batch, _cannot_be_undone))
        else:
            values.append(self._backward(last, self.student, micro_batch, self.any_process))
            self._exchange(last, micro_batch)
        return torch.stack(values).sum()

    def _backward(
        self, part: BatchPart, model: nn.Module, micro_batch: int, any_process: Callable[[bool], bool]
    ) -> Float[Tensor, ""]:
        encode, lengths = partial(part.encode, model), part.tokens.lengths[: part.count]
        return backward_in_micro_batches(encode, lengths, part.loss, micro_batch=micro_batch, any_process=any_process)

    def _surely_fits(self, part: BatchPart, micro_batch: int) -> bool:
        """Whether each process has run as many tokens at once as it has now."""
        fits = part.most <= micro_batch and part.token_count <= (self._fitted_tokens or 0)
        return not self.any_process(not fits)

    def _exchange(self, part: BatchPart, micro_batch: int) -> None:
        if distributed.world_size() == 1:
            return
        exchange_gradients(self.model, part.tokens.rows(part.tokens.lengths.argmin()[None]))
        if self._fitted_tokens is None:
            self._fitted_tokens = 0
        elif part.most <= micro_batch:
            self._fitted_tokens = max(self._fitted_tokens, part.token_count)


def _cannot_be_undone(out_of_memory: bool) -> bool:
    if out_of_memory:
        raise ResourceError(
            "out of memory while the processes exchange gradients, with no more tokens than fitted before: something else "
            "took memory. Go on with --train.resume and a smaller --train.micro-batch."
        )
    return False


def _say(line: str) -> None:
    if distributed.is_main():
        tqdm.write(line, file=sys.stderr)
