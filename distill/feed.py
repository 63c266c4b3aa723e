"""What each step is trained on: texts, their teacher vectors, and a bank of more of those."""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from distill import distributed, sampling
from distill.examples import Examples
from distill.gradients import Share
from distill.settings import TrainConfig
from distill.store import Store

Loss = Callable[..., Float[Tensor, ""]]


class Feed:
    """The batches of each step, and this process's share of them: a function of seed and step alone."""

    def __init__(self, data: Examples, store: Store, loss: Loss, config: TrainConfig, device: torch.device):
        self.data, self.store, self.loss = data, store, loss
        self.config, self.device = config, device

    def batches(self, step: int) -> list[np.ndarray]:
        """Rows of the global batches of a step."""
        size, accumulation = self.config.batch_size, self.config.accumulation
        return sampling.batches(step, len(self.data), batch_size=size, accumulation=accumulation, seed=self.config.seed)

    def shares(self, step: int) -> list[Share]:
        """This process's rows of each of the step's batches, with their losses."""
        batches = self.batches(step)
        total = sum(len(batch) for batch in batches)
        return [self._share(step, number, batch, total) for number, batch in enumerate(batches)]

    def _share(self, step: int, number: int, batch: np.ndarray, total: int) -> Share:
        """This process's rows of a batch of the step; `total` rows has the step."""
        place = distributed.share(len(batch))
        mine = batch[place.start : place.stop]
        tokens = self.data.tokens.rows(torch.from_numpy(mine if len(mine) else batch[:1]))
        most = -(-len(batch) // distributed.world_size())
        loss = partial(self._loss, step * self.config.accumulation + number, mine, len(batch) / total)
        return Share(tokens, len(mine), most, loss)

    def _loss(self, draw: int, rows: np.ndarray, weight: float, vectors: Float[Tensor, "b d"]) -> Float[Tensor, ""]:
        teacher = self.store.take(self.data.rows[rows]).to(self.device)
        bank, bank_keys = self._bank(draw)
        keys = self.data.keys[torch.from_numpy(rows)].to(self.device)
        return weight * distributed.global_loss(self.loss, vectors, teacher, bank=bank, keys=keys, bank_keys=bank_keys)

    def _bank(self, draw: int) -> tuple[Tensor | None, Tensor | None]:
        """Vectors and keys of the draw-th window of training rows, the same on every process."""
        if not self.config.bank_size or not getattr(self.loss, "uses_bank", False):
            return None, None
        chosen = sampling.bank_rows(draw, len(self.data), size=self.config.bank_size, seed=self.config.seed)
        keys = self.data.keys[torch.from_numpy(chosen)]
        return self.store.take(self.data.rows[chosen]).to(self.device), keys.to(self.device)
