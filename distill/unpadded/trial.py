"""Whether a model may be run on texts end to end: the places where it can be, and a trial of the model itself."""

import inspect
import logging
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from distill.unpadded import attention

log = logging.getLogger(__name__)
# Relative, of a model that is tried: a wrong position, or a look at another text, is far above.
TOLERANCE = 1e-3
# What a model says no with, or a kernel.
REFUSALS = (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)


def end_to_end(
    model: Any, ids: Int[Tensor, " t"], lengths: Int[Tensor, " b"], device: torch.device, *, pad_id: int
) -> attention.Texts | None:
    """Texts to `run`, if that can be: on CUDA under 16-bit autocast, without dropout, not compiled, by a model that allows it.

    The model is asked once, by trial: some tokens end to end have to give what they give with padding.
    """
    kernel = attention.kernel_for(device)
    if kernel is None or model.training or getattr(model, "_compiled_call_impl", None):
        return None
    if model not in _first_positions:
        _first_positions[model] = _first_position(model, device, kernel, pad_id)
    first = _first_positions[model]
    return None if first is None else attention.Texts(model, ids, lengths, device, kernel=kernel, first_position=first)


_first_positions: WeakKeyDictionary[nn.Module, int | None] = WeakKeyDictionary()


def _first_position(model: Any, device: torch.device, kernel: attention.Kernel, pad_id: int) -> int | None:
    """The number of a text's first position; None if the model gives something else for texts end to end, or cannot be run so."""
    config = model.config
    supported = getattr(model, "_supports_attention_backend", False)
    if not supported or "position_ids" not in inspect.signature(model.forward).parameters:
        return None
    if getattr(config, "sub_configs", None) or getattr(config, "attention_chunk_size", None):
        return None  # parts with attention of their own; attention by chunks, which are longer than what is tried
    padding = getattr(config, "pad_token_id", None)
    if padding is None or not 0 <= padding < config.vocab_size:  # Llama's can be -1
        padding = pad_id
    for first in (0, padding + 1):  # from 0 on; behind the padding's, as RoBERTa counts
        try:
            if _the_same(model, device, kernel, padding, first):
                return first
        except (torch.OutOfMemoryError, getattr(torch, "AcceleratorError", torch.OutOfMemoryError)):
            raise  # no word on the model
        except REFUSALS as refusal:
            log.info("%s, positions from %d: %r", type(model).__name__, first, refusal)
    log.info("%s keeps the padding of its texts", type(model).__name__)
    return None


@torch.inference_mode(False)  # where no kernel can show its gradient
@torch.no_grad()
def _the_same(model: Any, device: torch.device, kernel: attention.Kernel, padding: int, first: int) -> bool:
    """Whether some texts end to end give what they give with padding: exactly in the weights' own type, by the kernel as nearly as 16 bits do."""
    ids, lengths = _some_texts(model.config, padding)

    def together(one: attention.Kernel) -> Float[Tensor, "t d"]:
        return attention.Texts(model, ids, lengths, device, kernel=one, first_position=first).run().float()

    with torch.autocast(device.type, enabled=False):
        exact = _with_padding(model, ids, lengths, device, padding)
        if (together(attention.text_by_text) - exact).norm() > TOLERANCE * exact.norm():
            return False
    rounded = _with_padding(model, ids, lengths, device, padding)
    found = together(partial(_with_backward, kernel))
    torch.clear_autocast_cache()  # of weights cast without gradients, which older versions of torch use again
    return bool((found - exact).norm() <= 2 * (rounded - exact).norm() + TOLERANCE * exact.norm())


def _some_texts(config: Any, padding: int) -> tuple[Int[Tensor, " t"], Int[Tensor, " b"]]:
    """Texts of few and of many tokens, one of them a pad token: longer than most windows, more in all than most tables of positions have."""
    room = getattr(config, "max_position_embeddings", None) or 10**9
    free = room - padding - 1 if padding + 1 < room else room  # for a model that counts from behind the padding
    window = getattr(config, "sliding_window", None) or 0
    longest = min(free, max(160, window + 2 if window < 1000 else 0))
    lengths = [2, 1, *[longest] * (1 + min(room, 1000) // longest)]
    ids = torch.arange(sum(lengths)) * 7 % config.vocab_size
    ids[ids == padding] = (padding + 1) % config.vocab_size
    ids[4] = padding
    return ids, torch.tensor(lengths)


def _with_backward(
    kernel: attention.Kernel, query: Tensor, key: Tensor, value: Tensor, texts: attention.Texts, **options: Any
) -> Tensor:
    """`kernel`, which is to fail here if it can give no gradient."""
    with torch.enable_grad():
        parts = [part.detach().clone().requires_grad_() for part in (query, key, value)]
        kernel(*parts, texts, **options).float().sum().backward()
    return kernel(query, key, value, texts, **options)


def _with_padding(
    model: Any, ids: Int[Tensor, " t"], lengths: Int[Tensor, " b"], device: torch.device, padding: int
) -> Float[Tensor, "t d"]:
    rows = pad_sequence(list(ids.split(lengths.tolist())), batch_first=True, padding_value=padding)
    mask = (torch.arange(rows.shape[1]) < rearrange(lengths, "b -> b 1")).to(device)
    return model(input_ids=rows.to(device), attention_mask=mask.long())[0][mask].float()
