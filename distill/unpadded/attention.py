"""Attention over texts that stand end to end: a whole model without padding, where the hardware and the model allow it.

transformers lets a function of ours stand in for a model's attention; torch's own flash attention takes texts of any
lengths in one call. Positions begin again with every text, which the model is told.
"""

import inspect
from collections.abc import Callable
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from distill.unpadded.places import entered, here

NAME = "distill_texts"
TRIED = (2, 1, 160)  # tokens of the texts that a model is tried on; 160: more than the windows of most local layers
NOT_SO = (
    AttributeError,
    IndexError,
    KeyError,
    RuntimeError,
    TypeError,
    ValueError,
)  # what a model or a kernel says no with
TOLERANCE = 1e-3  # relative; a wrong position, or a look at another text, is far above


Kernel = Callable[..., Float[Tensor, "t h d"]]  # called as text_by_text is


class Texts:
    """Texts end to end: which token is whose, and how a model is run on them. Inside `with`, its attention stays within a text."""

    def __init__(
        self, model: Any, lengths: Int[Tensor, " b"], device: torch.device, *, kernel: Kernel, first_position: int = 0
    ):
        """`lengths`, each 1 or more, are on the CPU; `first_position` is the number of a text's first position."""
        lengths = lengths.long()
        inside = torch.arange(int(lengths.sum())) - torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)
        self.model, self.kernel, self.lengths = model, kernel, lengths.tolist()
        self.positions = rearrange(inside + first_position, "t -> 1 t").to(device)
        self.edges = F.pad(lengths.cumsum(0), (1, 0)).int().to(device)

    def run(self, ids: Int[Tensor, " t"]) -> Float[Tensor, "t d"]:
        """What the model says of each token: values and gradients are those with padding, to rounding."""
        with entered(self):
            row = rearrange(ids, "t -> 1 t").to(self.positions.device)
            return rearrange(self.model(input_ids=row, position_ids=self.positions)[0], "1 t d -> t d")

    def __len__(self) -> int:
        """Tokens."""
        return self.positions.shape[1]

    def __enter__(self) -> None:
        from transformers import AttentionInterface

        AttentionInterface.register(NAME, _attention)
        # All that a layer asks; the public setter walks through every module, which is too much for every batch.
        self._before, self.model.config._attn_implementation = self.model.config._attn_implementation, NAME

    def __exit__(self, *_: object) -> None:
        self.model.config._attn_implementation = self._before


def end_to_end(model: Any, lengths: Int[Tensor, " b"], device: torch.device, *, pad_id: int) -> Texts | None:
    """Texts of these lengths, for `run`, if it can be used: on CUDA under 16-bit autocast, without dropout, with a model that allows it.

    The model is asked once, by trial: a few tokens end to end have to give what they give with padding.
    """
    kernel = kernel_for(device)
    if kernel is None or model.training or getattr(model, "_compiled_call_impl", None):
        return None
    if model not in _first_positions:
        _first_positions[model] = _first_position(model, device, kernel, pad_id)
    first = _first_positions[model]
    return None if first is None else Texts(model, lengths, device, kernel=kernel, first_position=first)


def kernel_for(device: torch.device) -> Kernel | None:
    """What computes attention over texts end to end; None where nothing does it fast."""
    if device.type != "cuda" or not torch.is_autocast_enabled("cuda"):
        return None
    if torch.cuda.get_device_capability(device) < (8, 0):  # flash attention asks for it
        return None
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:  # torch before 2.10
        return None
    return flash if "window_size" in inspect.signature(varlen_attn).parameters else None


def flash(
    query: Tensor, key: Tensor, value: Tensor, texts: Texts, *, scale: float | None, causal: bool, reach: int | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    dtype = torch.get_autocast_dtype(query.device.type)  # to which autocast does not bring a custom operator's inputs
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    longest, back = max(texts.lengths), -1 if reach is None else reach
    window = (back, 0 if causal else back)
    output = varlen_attn(query, key, value, texts.edges, texts.edges, longest, longest, scale=scale, window_size=window)
    return cast(Tensor, output)


def text_by_text(
    query: Tensor, key: Tensor, value: Tensor, texts: Texts, *, scale: float | None, causal: bool, reach: int | None
) -> Tensor:
    """Attention within each text: a token sees `reach` tokens before it and, unless `causal`, behind it; None: its whole text.

    As `flash`, in any type on any device, slowly: what a model is tried with, and what tests run.
    """
    heads = rearrange([query, key, value], "n t h d -> t n h d").split(texts.lengths)
    outputs = []
    for text in heads:
        q, k, v = rearrange(text, "t n h d -> n h t d")
        mask = _seen(len(text), causal, reach).to(query.device)
        outputs.append(rearrange(F.scaled_dot_product_attention(q, k, v, mask, scale=scale), "h t d -> t h d"))
    return torch.cat(outputs)


def _seen(length: int, causal: bool, reach: int | None) -> Bool[Tensor, "l l"]:
    back = rearrange(torch.arange(length), "l -> l 1") - torch.arange(length)
    return (back.abs() <= (length if reach is None else reach)) & ((back >= 0) | (not causal))


def _attention(
    module: nn.Module,
    query: Float[Tensor, "1 h t d"],
    key: Float[Tensor, "1 k t d"],
    value: Float[Tensor, "1 k t d"],
    attention_mask: None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Float[Tensor, "1 t h d"], None]:
    """What transformers calls in place of a model's own attention."""
    texts = here()
    foreign = [name for name in ("softcap", "s_aux", "position_bias") if options.get(name) is not None]
    if not isinstance(texts, Texts) or attention_mask is not None or foreign:
        raise ValueError(f"attention over texts end to end has no mask of its own, and no {', '.join(foreign)}.")
    groups = query.shape[1] // key.shape[1]
    keys, values = (repeat(part, "1 k t d -> t (k groups) d", groups=groups) for part in (key, value))
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    output = texts.kernel(
        rearrange(query, "1 h t d -> t h d"),
        keys,
        values,
        texts,
        scale=scaling,
        causal=causal,
        reach=None if sliding_window is None else sliding_window - 1,
    )
    return rearrange(output, "t h d -> 1 t h d"), None


_first_positions: WeakKeyDictionary[nn.Module, int | None] = WeakKeyDictionary()


def _first_position(model: Any, device: torch.device, kernel: Kernel, pad_id: int) -> int | None:
    """The number of a text's first position; None if the model gives something else for texts end to end, or cannot be run so."""
    supported = getattr(model, "_supports_attention_backend", False)
    if not supported or "position_ids" not in inspect.signature(model.forward).parameters:
        return None
    room = getattr(model.config, "max_position_embeddings", None) or max(TRIED)
    for first in (0, pad_id + 1):  # from 0 on; behind the padding's, as RoBERTa counts
        try:
            if first < room and _deviation(model, device, kernel, pad_id, first, room) < TOLERANCE:
                return first
        except NOT_SO:
            continue
    return None


@torch.no_grad()
def _deviation(model: Any, device: torch.device, kernel: Kernel, pad_id: int, first: int, room: int) -> float:
    """Of what the model says for texts end to end from what it says with padding, relative, in the weights' own type."""
    lengths = torch.tensor(TRIED).clamp(max=room - first)
    ids = torch.arange(int(lengths.sum())) * 7 % model.config.vocab_size
    ids[ids == pad_id] = (pad_id + 1) % model.config.vocab_size
    with torch.autocast(device.type, enabled=False):
        padded = _padded(model, ids, lengths, device, pad_id)
        found = Texts(model, lengths, device, kernel=text_by_text, first_position=first).run(ids)
    Texts(model, lengths, device, kernel=kernel, first_position=first).run(
        ids
    )  # which may not take heads of this width
    return float((found - padded).norm() / padded.norm())


def _padded(
    model: Any, ids: Int[Tensor, " t"], lengths: Int[Tensor, " b"], device: torch.device, pad_id: int
) -> Float[Tensor, "t d"]:
    rows = pad_sequence(list(ids.split(lengths.tolist())), batch_first=True, padding_value=pad_id)
    mask = (torch.arange(rows.shape[1]) < rearrange(lengths, "b -> b 1")).to(device)
    return model(input_ids=rows.to(device), attention_mask=mask.long())[0][mask]
