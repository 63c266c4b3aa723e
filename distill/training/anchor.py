"""Rare tokens stay near their start: a pull on the rows of a static table."""

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn


class TableAnchor:
    """Pulls the rows of a trained table back to where they were when this was made, those of rare tokens most.

    After an update at learning rate r, row v goes the share min(1, r * strength / (1 + count of v)) of its way back. Adam gives
    the few gradients of a rare token as large a step as the many of a common one: its row would follow noise. Weight decay to
    the start instead of to 0, decoupled from Adam's moments: Li, Grandvalet and Davoine 2018 (L2-SP).
    Cost: one pass over the table a step, and its memory once more.
    """

    def __init__(self, table: nn.Parameter, ids: Int[Tensor, " t"], *, strength: float) -> None:
        if not 0 < strength < float("inf"):
            raise ValueError(f"TableAnchor needs a strength above 0, got {strength}. Leave it out to leave rows free.")
        self.table, self.start = table, table.detach().clone()
        counts = torch.bincount(ids.long(), minlength=len(table)).to(table.device)
        self.strengths: Float[Tensor, " v"] = strength / (1 + counts.to(table.dtype))

    @torch.no_grad()
    def pull(self, rate: float) -> None:
        """After an update of the table at the learning rate `rate`."""
        shares = (rate * self.strengths).clamp(max=1)
        self.table.lerp_(self.start, rearrange(shares, "v -> v 1"))
