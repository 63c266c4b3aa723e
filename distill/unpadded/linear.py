"""Linear layers that skip padding: a transformer's products, which most of its time goes into, on the tokens that are there."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor
from torch.overrides import TorchFunctionMode

from distill.unpadded.context import entered
from distill.unpadded.places import Places

FULL = 0.9  # of the places: with more tokens than that there is nothing to gain


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
    with entered(_Skipping(Places(mask, device))):
        yield


class _Skipping(TorchFunctionMode):
    def __init__(self, places: Places):
        super().__init__()
        self.places = places
        self._last: tuple[Any, int, Any] = (None, 0, None)

    def __exit__(self, *of: Any) -> None:
        # A backward pass that runs layers again keeps this mode for them: with rows of its own it would keep the graph alive.
        self._last = (None, 0, None)
        super().__exit__(*of)

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if function is F.linear and args[0].ndim == 3 and args[0].shape[:2] == self.places.shape:
            return self.places.put_back(function(self._tokens(args[0]), *args[1:], **(kwargs or {})))
        return function(*args, **(kwargs or {}))

    def _tokens(self, hidden: Float[Tensor, "b l d"]) -> Float[Tensor, "t d"]:
        """The tokens' rows. Query, key and value have one input, whose rows are taken, and kept for the backward pass, once."""
        if hidden.is_inference():  # keeps nothing, and does not say whether it was changed in place
            return self.places.taken(hidden)
        known, version, rows = self._last
        if known is not hidden or version != hidden._version:
            rows = self.places.taken(hidden)
            self._last = (hidden, hidden._version, rows)
        return rows
