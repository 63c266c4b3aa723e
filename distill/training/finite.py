"""Steps whose loss or gradient is not finite: all processes stop before the update, and say which rows are to blame."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from distill import distributed
from distill.encoder import Encoder
from distill.modules import Tokens


def on_all_processes(loss: Float[Tensor, ""], norm: Float[Tensor, ""], device: torch.device) -> bool:
    """Whether loss and gradient norm are finite everywhere. Every process gets the same answer."""
    finite = bool(torch.isfinite(loss) & torch.isfinite(norm))
    return not distributed.any_process(not finite, device)


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
