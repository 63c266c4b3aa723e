"""What each step is trained on: texts, their teacher vectors, and a bank of more of those, hard ones at last if asked for."""

import sys
from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from distill import distributed
from distill.ahead import ahead, sent
from distill.modules import Tokens
from distill.store import Store
from distill.training import mining, sampling
from distill.training.examples import Examples
from distill.training.gradients import BatchPart
from distill.training.settings import TrainConfig

Loss = Callable[..., Float[Tensor, ""]]


class Feed:
    """The batches of each step, and this process's share of them: a function of seed and step alone."""

    def __init__(
        self, data: Examples, store: Store, loss: Loss, config: TrainConfig, *, steps: int, device: torch.device
    ):
        self.data, self.store, self.loss = data, store, loss
        self.config, self.device = config, device
        self.hard_from = steps - max(1, round((config.hard_stage or 0) * steps))
        self.steps = steps
        self._neighbours: np.ndarray | None = None
        self._coming: Generator[list[_Read], None, None] | None = None
        self._terms: dict[int, dict[str, Any]] = {}  # of the step's batches, by their number
        config.check_bank(loss)
        if config.bank_size and not getattr(loss, "uses_bank", False) and distributed.is_main():
            print(
                f"no bank of {config.bank_size:,} rows: the loss uses none (CrossKL() does, cross_kl not)",
                file=sys.stderr,
            )

    def prepare(self) -> None:
        """Find the neighbours of the hard stage, if there is one to be. Cost: that of `mining.hard_neighbours`, once."""
        if self.config.hard_stage:
            count, margin = self.config.hard_neighbours, self.config.hard_margin
            self._neighbours = mining.hard_neighbours(
                self.data, self.store, count=count, margin=margin, device=self.device
            )

    def batches(self, step: int) -> list[np.ndarray]:
        """Rows of the global batches of a step."""
        size, accumulation = self.config.batch_size, self.config.accumulation
        return sampling.batches(step, len(self.data), batch_size=size, accumulation=accumulation, seed=self.config.seed)

    def parts(self, step: int) -> list[BatchPart]:
        """This process's rows of each of the step's batches, with their losses. Steps are asked for one after the other."""
        reads = self._coming_reads(step)
        total = sum(read.texts for read in reads)
        self._terms.clear()
        return [self._part(number, read, total) for number, read in enumerate(reads)]

    def terms(self) -> dict[str, Any]:
        """The terms of the step's loss by name, if it has `parts`: each the mean over the batches, by rows, as the loss is."""
        batches = self._terms.values()
        names = dict.fromkeys(name for terms in batches for name in terms)
        return {name: sum(terms[name] for terms in batches if name in terms) for name in names}

    def close(self) -> None:
        """End the thread that reads ahead, if there is one."""
        if self._coming is not None:
            self._coming.close()
            self._coming = None

    def _coming_reads(self, step: int) -> "list[_Read]":
        on_cuda = self.device.type == "cuda"
        if not (on_cuda if self.config.read_ahead is None else self.config.read_ahead):
            return self._read(step)
        if self._coming is None:
            self._coming = ahead(self._read(number) for number in range(step, self.steps))
        return next(self._coming)

    def _read(self, step: int) -> "list[_Read]":
        """Everything that a step reads, on the CPU, whence a device fetches it."""
        return [self._read_batch(step, number, batch) for number, batch in enumerate(self.batches(step))]

    def _read_batch(self, step: int, number: int, batch: np.ndarray) -> "_Read":
        place = distributed.share(len(batch))
        mine = batch[place.start : place.stop]
        bank = self._bank_rows(step, number, batch)
        return _Read(
            texts=len(batch),
            count=len(mine),
            tokens=self.data.tokens.rows(torch.from_numpy(mine if len(mine) else batch[:1])),
            teacher=self._stored(mine),
            keys=self.data.keys[torch.from_numpy(mine)],
            bank=None if bank is None else self._stored(bank),
            bank_keys=None if bank is None else self.data.keys[torch.from_numpy(bank)],
        )

    def _stored(self, rows: np.ndarray) -> Tensor:
        vectors = self.store.take_stored(self.data.rows[rows])
        return vectors.pin_memory() if self.device.type == "cuda" else vectors

    def _part(self, number: int, read: "_Read", total: int) -> BatchPart:
        """The step has `total` rows."""
        most = -(-read.texts // distributed.world_size())
        return BatchPart(read.tokens, read.count, most, partial(self._loss, number, read, read.texts / total))

    def _loss(self, number: int, read: "_Read", weight: float, vectors: Float[Tensor, "b d"]) -> Float[Tensor, ""]:
        teacher = self._here(read.teacher).float()
        keys = self._here(read.keys) if getattr(self.loss, "uses_bank", False) else None
        bank = None if read.bank is None else self._here(read.bank).float()
        bank_keys = None if read.bank_keys is None else self._here(read.bank_keys)
        value = distributed.global_loss(self.loss, vectors, teacher, bank=bank, keys=keys, bank_keys=bank_keys)
        parts: dict[str, Any] = getattr(self.loss, "parts", dict)()
        self._terms[number] = {name: weight * part for name, part in parts.items()}
        return weight * value

    def _here(self, tensor: Tensor) -> Tensor:
        return sent(tensor, self.device)

    def _bank_rows(self, step: int, number: int, batch: np.ndarray) -> np.ndarray | None:
        """The bank of a step's batch, the same on every process: a window of the texts, or neighbours; None without one."""
        if not self.config.bank_size or not getattr(self.loss, "uses_bank", False):
            return None
        draw = step * self.config.accumulation + number
        chosen = sampling.bank_rows(draw, len(self.data), size=self.config.bank_size, seed=self.config.seed)
        if self._neighbours is not None and step >= self.hard_from:
            chosen = sampling.hard_bank_rows(batch, self._neighbours, chosen)
        return chosen


@dataclass(frozen=True)
class _Read:
    """Of a batch of so many `texts` over all processes: this one's `count`, and the bank. Vectors as they are stored."""

    texts: int
    count: int
    tokens: Tokens  # of one text if this process has none
    teacher: Tensor
    keys: Tensor
    bank: Tensor | None
    bank_keys: Tensor | None
