"""Which places of a rectangle of texts hold a token, and what is the same in a backward pass as it was in the forward pass."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Result = TypeVar("Result")


class Places:
    """The places of a mask that are true, in its order. The mask is on the CPU, where it decides shapes; vectors are on `device`."""

    def __init__(self, mask: Bool[Tensor, "b l"], device: torch.device):
        there, places = mask.flatten(), mask.flatten().nonzero().squeeze(1)
        rows = torch.where(there, there.cumsum(0) - 1, len(places))
        self.shape, self._places, self._rows = mask.shape, places.to(device), rows.to(device)

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


def as_here(function: Callable[..., Result]) -> Callable[..., Result]:
    """`function` as it runs here, wherever it is called: in a backward pass that computes activations again."""
    way = _current.get()

    def call(*inputs: Any, **options: Any) -> Result:
        if way is None or way is _current.get():
            return function(*inputs, **options)
        with entered(way):
            return function(*inputs, **options)

    return call


def current() -> AbstractContextManager[Any] | None:
    """The way that was entered last."""
    return _current.get()


@contextmanager
def entered(way: AbstractContextManager[Any]) -> Iterator[None]:
    """Inside `way`, which `as_here` enters again, later and from another thread."""
    token = _current.set(way)
    try:
        with way:
            yield
    finally:
        _current.reset(token)


_current: ContextVar[AbstractContextManager[Any] | None] = ContextVar("unpadded", default=None)
