"""Steps whose loss or gradient is not finite: all processes stop before the update, and say which rows are to blame."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from distill.encoder import Encoder
from distill.modules import Tokens


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Scalars, of a device or not, as numbers. The host waits for the device once for all of them."""
    scalars = {name: value.detach().reshape(()) for name, value in values.items() if isinstance(value, Tensor)}
    device = next((scalar.device for scalar in scalars.values()), None)
    read = torch.stack([scalar.to(device) for scalar in scalars.values()]).tolist() if scalars else []
    found = dict(zip(scalars, read, strict=True))
    return {name: found[name] if name in found else float(value) for name, value in values.items()}


def are_finite(*values: float) -> bool:
    """Whether all of them are, on this process."""
    return all(map(math.isfinite, values))


@torch.no_grad()
def bad_rows(encoder: Encoder, tokens: Tokens, targets: Float[Tensor, "b e"] | None) -> Bool[Tensor, " b"]:
    """Which rows have a vector or a target that is not finite. Cost: encodes them again, 64 at a time."""
    parts = torch.arange(len(tokens)).split(64)
    finite = torch.cat([encoder(tokens.rows(part)).cpu().isfinite().all(dim=1) for part in parts])
    return ~(finite if targets is None else finite & targets.cpu().isfinite().all(dim=1))


def stopped(step: int, loss: float, norm: float, bad: int) -> str:
    """The beginning of the message, without a full stop; `bad` rows have a vector that is not finite."""
    return (
        f"step {step}: loss {loss}, gradient norm {norm}; stopped before the update. {bad or 'No'} rows have a vector that "
        "is not finite"
    )
