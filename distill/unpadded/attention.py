"""Attention over texts that stand end to end: a whole model without padding, where the hardware and the model allow it.

transformers lets a function of ours stand in for a model's attention; torch's own flash attention takes texts of any
lengths in one call. Positions begin again with every text, which the model is told.
"""

import inspect
from collections.abc import Callable
from functools import cache
from threading import RLock
from typing import Any, cast

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from distill.ahead import sent
from distill.unpadded.context import current, entered

NAME = "distill_texts"

Kernel = Callable[..., Float[Tensor, "t h d"]]  # called as text_by_text is


class Texts:
    """Texts end to end: which token is whose, and how a model is run on them. Inside `with`, its attention stays within a text.

    `lengths`, each 1 or more, and `ids` are on the CPU. `first_position` is the number of a text's first position; behind
    `pad_id`, as RoBERTa counts, a pad token within a text has the number of the padding.
    """

    def __init__(
        self,
        model: Any,
        ids: Int[Tensor, " t"],
        lengths: Int[Tensor, " b"],
        device: torch.device,
        *,
        kernel: Kernel,
        first_position: int = 0,
    ):
        self.model, self.kernel, self.lengths, self.longest = model, kernel, lengths.tolist(), int(lengths.max())
        edges = F.pad(lengths.long().cumsum(0), (1, 0))
        counted = ids != first_position - 1
        running = F.pad(counted.long().cumsum(0), (1, 0))
        inside = running[1:] - torch.repeat_interleave(running[edges[:-1]], lengths.long())
        self.positions = sent(inside * counted + first_position - 1, device)
        self.edges, self.ids = sent(edges.int(), device), sent(ids, device)
        self._before: list[str] = []

    def run(self) -> Float[Tensor, "t d"]:
        """What the model says of each token: values and gradients are those with padding, to rounding."""
        row, positions = rearrange(self.ids, "t -> 1 t"), rearrange(self.positions, "t -> 1 t")
        with entered(self):
            return rearrange(self.model(input_ids=row, position_ids=positions)[0], "1 t d -> t d")

    def __len__(self) -> int:
        """Tokens."""
        return len(self.ids)

    def __enter__(self) -> None:
        from transformers import AttentionInterface

        AttentionInterface.register(NAME, _attention)
        _one_thread.acquire()
        self._before.append(self.model.config._attn_implementation)
        # What every layer asks; the public setter walks through all modules, which is too much for every batch.
        self.model.config._attn_implementation = NAME

    def __exit__(self, *_: object) -> None:
        self.model.config._attn_implementation = self._before.pop()
        _one_thread.release()


def kernel_for(device: torch.device) -> Kernel | None:
    """What computes attention over texts end to end; None where nothing does it fast."""
    if device.type != "cuda" or not torch.is_autocast_enabled("cuda") or "window_size" not in _varlen_options():
        return None
    return flash if torch.cuda.get_device_capability(device) >= (8, 0) else None  # flash attention asks for it


@cache
def _varlen_options() -> frozenset[str]:
    """What torch's own takes; nothing where there is none, before 2.10."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    return frozenset(inspect.signature(varlen_attn).parameters)


def flash(
    query: Tensor, key: Tensor, value: Tensor, texts: Texts, *, scale: float | None, causal: bool, reach: int | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    dtype = torch.get_autocast_dtype(query.device.type)  # to which autocast does not bring a custom operator's inputs
    options: dict[str, Any] = {}
    if (groups := query.shape[1] // key.shape[1]) > 1:
        if "enable_gqa" in _varlen_options():
            options["enable_gqa"] = True
        else:
            key, value = (repeat(part, "t k d -> t (k groups) d", groups=groups) for part in (key, value))
    back = -1 if reach is None else reach
    output = varlen_attn(
        query.to(dtype),
        key.to(dtype),
        value.to(dtype),
        texts.edges,
        texts.edges,
        texts.longest,
        texts.longest,
        scale=scale,
        window_size=(back, 0 if causal else back),
        **options,
    )
    return cast(Tensor, output)


def text_by_text(
    query: Float[Tensor, "t h d"],
    key: Float[Tensor, "t k d"],
    value: Float[Tensor, "t k d"],
    texts: Texts,
    *,
    scale: float | None,
    causal: bool,
    reach: int | None,
) -> Float[Tensor, "t h d"]:
    """Attention within each text: a token sees `reach` tokens before it and, unless `causal`, behind it; None: its whole text.

    As `flash`, in any type on any device, slowly: what a model is tried with, and what tests run.
    """
    outputs = []
    for parts in zip(*(part.split(texts.lengths) for part in (query, key, value)), strict=True):
        q, k, v = (rearrange(part, "t h d -> 1 h t d") for part in parts)
        mask = _seen(q.shape[2], causal, reach).to(query.device)
        output = F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True)
        outputs.append(rearrange(output, "1 h t d -> t h d"))
    return torch.cat(outputs)


def _seen(length: int, causal: bool, reach: int | None) -> Bool[Tensor, "l l"]:
    back = rearrange(torch.arange(length), "l -> l 1") - torch.arange(length)
    return (back.abs() <= (length if reach is None else reach)) & ((back >= 0) | (not causal))


def _attention(
    module: nn.Module,
    query: Float[Tensor, "1 h t d"],
    key: Float[Tensor, "1 k t d"],
    value: Float[Tensor, "1 k t d"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Float[Tensor, "1 t h d"], None]:
    """What transformers calls in place of a model's own attention."""
    texts = current()
    if not isinstance(texts, Texts):
        raise ValueError(
            f"the attention {NAME} is for distill's own calls; choose another with set_attn_implementation."
        )
    if attention_mask is not None:
        raise ValueError("texts end to end have no attention mask: each is seen by itself.")
    foreign = [name for name in ("softcap", "s_aux", "position_bias") if options.get(name) is not None]
    if foreign:
        raise ValueError(f"attention over texts end to end has no {', '.join(foreign)}.")
    output = texts.kernel(
        *(rearrange(part, "1 h t d -> t h d") for part in (query, key, value)),
        texts,
        scale=scaling,
        causal=getattr(module, "is_causal", True) if is_causal is None else is_causal,
        reach=None if sliding_window is None else sliding_window - 1,
    )
    return rearrange(output, "t h d -> 1 t h d"), None


_one_thread = RLock()  # a model has one config: while its attention is replaced, other threads wait
