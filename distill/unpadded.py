"""Linear layers that skip padding: a transformer's products, which most of its time goes into, on the tokens that are there.

A group of texts is as wide as its longest. Nothing reads the places behind a shorter text (attention masks them, pooling
leaves them out), but a transformer multiplies them all the same.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.overrides import TorchFunctionMode

FULL = 0.9  # of the places: with more tokens than that there is nothing to gain

Result = TypeVar("Result")


@contextmanager
def skipping(mask: Bool[Tensor, "b l"], device: torch.device) -> Iterator[None]:
    """In the block linear layers get of a (b, l, d) input the places of the mask alone; their output is 0 elsewhere.

    Values and gradients at those places are what they were, to rounding, for any transformer that does not read masked
    places. The mask is on the CPU, where it decides shapes; the inputs are on `device`. Texts as many as their longest has
    tokens are left as they are: such an input does not tell which axis is which.
    """
    if mask.shape[0] == mask.shape[1] or mask.sum() > FULL * mask.numel():
        yield
        return
    with _entered(_Skipping(mask, device)):
        yield


def as_here(function: Callable[..., Result]) -> Callable[..., Result]:
    """`function` as it runs here, wherever it is called: in a backward pass that computes activations again."""
    mode = _current.get()

    def call(*inputs: Any, **options: Any) -> Result:
        if mode is None or mode is _current.get():
            return function(*inputs, **options)
        with _entered(mode):
            return function(*inputs, **options)

    return call


class _Skipping(TorchFunctionMode):
    """`places` of the tokens among all, and for each place the row of its token among the tokens."""

    def __init__(self, mask: Bool[Tensor, "b l"], device: torch.device):
        super().__init__()
        there, places = mask.flatten(), mask.flatten().nonzero().squeeze(1)
        rows = torch.where(there, there.cumsum(0) - 1, len(places))
        self.shape, self.places, self.rows = mask.shape, places.to(device), rows.to(device)
        self._last: tuple[Any, int, Tensor] = (None, 0, self.places)

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if function is F.linear and args[0].ndim == 3 and args[0].shape[:2] == self.shape:
            output = function(self._tokens(args[0]), *args[1:], **(kwargs or {}))
            return _Exchange.apply(output, self.rows, self.places).unflatten(0, self.shape)
        return function(*args, **(kwargs or {}))

    def _tokens(self, hidden: Float[Tensor, "b l d"]) -> Float[Tensor, "t d"]:
        """The tokens' rows. Query, key and value have one input, whose rows are taken, and kept for the backward pass, once."""
        if hidden.is_inference():  # keeps nothing, and does not say whether it was changed in place
            return _gathered(hidden.flatten(0, 1), self.places)
        known, version, rows = self._last
        if known is not hidden or version != hidden._version:
            rows = _Exchange.apply(hidden.flatten(0, 1), self.places, self.rows)
            self._last = (hidden, hidden._version, rows)
        return rows


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


_current: ContextVar[_Skipping | None] = ContextVar("skipping", default=None)


@contextmanager
def _entered(mode: _Skipping) -> Iterator[None]:
    token = _current.set(mode)
    try:
        with mode:
            yield
    finally:
        _current.reset(token)
