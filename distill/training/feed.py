"""What each step is trained on: texts, their teacher vectors, and a bank of more of those, hard ones at last if asked for."""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from distill import distributed
from distill.errors import RecipeError
from distill.store import Store
from distill.training import mining, sampling
from distill.training.examples import Examples
from distill.training.gradients import Share
from distill.training.settings import TrainConfig

Loss = Callable[..., Float[Tensor, ""]]
Bank = tuple[Tensor | None, Tensor | None]  # vectors and keys


class Feed:
    """The batches of each step, and this process's share of them: a function of seed and step alone."""

    def __init__(
        self, data: Examples, store: Store, loss: Loss, config: TrainConfig, *, steps: int, device: torch.device
    ):
        self.data, self.store, self.loss = data, store, loss
        self.config, self.device = config, device
        self.hard_from = steps - max(1, round((config.hard_stage or 0) * steps))
        self._neighbours: np.ndarray | None = None
        if config.hard_stage and not getattr(loss, "uses_bank", False):
            raise RecipeError("--train.hard-stage fills the bank of a loss, and this one uses none. Leave it out.")

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
        bank = partial(self._bank, step, number, batch)
        return Share(tokens, len(mine), most, partial(self._loss, mine, bank, len(batch) / total))

    def _loss(
        self, rows: np.ndarray, bank_of: Callable[[], Bank], weight: float, vectors: Float[Tensor, "b d"]
    ) -> Float[Tensor, ""]:
        teacher = self.store.take(self.data.rows[rows], self.device)
        bank, bank_keys = bank_of()
        keys = self.data.keys[torch.from_numpy(rows)].to(self.device)
        return weight * distributed.global_loss(self.loss, vectors, teacher, bank=bank, keys=keys, bank_keys=bank_keys)

    def _bank(self, step: int, number: int, batch: np.ndarray) -> Bank:
        """Vectors and keys of the bank of a step's batch, the same on every process: a window of the texts, or neighbours."""
        if not self.config.bank_size or not getattr(self.loss, "uses_bank", False):
            return None, None
        draw = step * self.config.accumulation + number
        chosen = sampling.bank_rows(draw, len(self.data), size=self.config.bank_size, seed=self.config.seed)
        if self._neighbours is not None and step >= self.hard_from:
            chosen = sampling.hard_bank_rows(batch, self._neighbours, chosen)
        keys = self.data.keys[torch.from_numpy(chosen)]
        return self.store.take(self.data.rows[chosen], self.device), keys.to(self.device)
