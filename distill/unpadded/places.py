"""Which places of a rectangle of texts hold a token."""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from distill.ahead import sent


class Places:
    """The places of a mask that are true, in its order. The mask is on the CPU, where it decides shapes; vectors are on `device`."""

    def __init__(self, mask: Bool[Tensor, "b l"], device: torch.device):
        there, places = mask.flatten(), mask.flatten().nonzero().squeeze(1)
        rows = torch.where(there, there.cumsum(0) - 1, len(places))
        self.shape, self._places, self._rows = mask.shape, sent(places, device), sent(rows, device)

    def taken(self, hidden: Float[Tensor, "b l d"]) -> Float[Tensor, "t d"]:
        return _Exchange.apply(hidden.flatten(0, 1), self._places, self._rows)

    def put_back(self, rows: Float[Tensor, "t d"]) -> Float[Tensor, "b l d"]:
        """0 elsewhere."""
        return _Exchange.apply(rows, self._rows, self._places).unflatten(0, self.shape)


class _Exchange(torch.autograd.Function):
    """The rows that `there` names, 0 for one past the last; `back` names those of the gradient. Both ways one gather, and nothing is kept."""

    @staticmethod
    def forward(ctx: Any, rows: Float[Tensor, "n d"], there: Int[Tensor, " m"], back: Int[Tensor, " n"]) -> Tensor:
        ctx.there, ctx.back = there, back
        return _gathered(rows, there)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _gathered(gradient, ctx.back), None, None


def _gathered(rows: Float[Tensor, "n d"], index: Int[Tensor, " m"]) -> Float[Tensor, "m d"]:
    if len(index) > len(rows):  # from tokens to places
        rows = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
    return rows.index_select(0, index)
