"""The parts an encoder is made of: token batches without padding, backbones, pooling, the layers behind it; and eval mode.

Axes: b texts · t tokens of all texts, end to end · l tokens of the longest text of a group · d width of a vector · v vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from distill import similarity
from distill.ahead import sent
from distill.quantized import TableFormat
from distill.unpadded.linear import skipping
from distill.unpadded.places import Places
from distill.unpadded.trial import end_to_end

PoolingMode = Literal["mean", "cls", "lasttoken", "max", "mean_sqrt_len_tokens", "weightedmean"]


@dataclass(frozen=True, eq=False)
class Tokens:
    """Token ids of b texts, end to end, without padding. Both stay on the CPU: lengths decide shapes (and DDP moves tuples, not this)."""

    ids: Int[Tensor, " t"]
    lengths: Int[Tensor, " b"]

    @cached_property
    def starts(self) -> Int[Tensor, " b"]:
        """Where each text begins in `ids`. Cost: all texts, once."""
        lengths = self.lengths.long()
        return lengths.cumsum(0) - lengths

    @classmethod
    def from_lists(cls, ids: Sequence[Sequence[int]]) -> "Tokens":
        flat = torch.tensor([token for text in ids for token in text], dtype=torch.int32)
        return cls(flat, torch.tensor([len(text) for text in ids], dtype=torch.int32))

    def rows(self, index: Int[Tensor, " k"]) -> "Tokens":
        """The texts at `index`, in that order. Cost: their tokens."""
        lengths = self.lengths[index].long()
        ahead = self.starts[index] - (lengths.cumsum(0) - lengths)  # of where each text comes to stand
        places = torch.repeat_interleave(ahead, lengths) + torch.arange(int(lengths.sum()))
        return Tokens(self.ids[places], lengths.int())

    def grouped(self, token_budget: int) -> Iterator[tuple[Int[Tensor, " k"], "Tokens"]]:
        """Groups of texts of similar length, each at most `token_budget` padded tokens (or one text)."""
        for index in self.groups(token_budget):
            yield index, self.rows(index)

    def groups(self, token_budget: int) -> Iterator[Int[Tensor, " k"]]:
        """The texts of each group of `grouped`, the longest last."""
        order = torch.argsort(self.lengths, stable=True)
        lengths, start = self.lengths[order].tolist(), 0
        for stop in range(1, len(lengths) + 1):
            full = stop < len(lengths) and (stop + 1 - start) * lengths[stop] > token_budget
            if full or stop == len(lengths):
                yield order[start:stop]
                start = stop

    def padded(self, token_budget: int) -> int:
        """Tokens of all groups, padding included."""
        return sum(len(index) * int(self.lengths[index[-1]]) for index in self.groups(token_budget))

    def __len__(self) -> int:
        return len(self.lengths)


@dataclass(frozen=True)
class Reading:
    """Tokens that a transformer has read, and the places that they took: what is more is padding."""

    tokens: int = 0
    places: int = 0

    def __add__(self, other: "Reading") -> "Reading":
        return Reading(self.tokens + other.tokens, self.places + other.places)

    @property
    def padding(self) -> float:
        """The share of padding."""
        return 1 - self.tokens / max(1, self.places) if self.places else 0.0


class TransformerBackbone(nn.Module):
    """A Hugging Face encoder and a pooling: tokens -> (b, d).

    Texts are run in groups of similar length, without the padding that is left (`unpadded`; a model that is compiled has
    it), so that a batch drawn at random costs little more than its tokens; the vectors come back in the order of the batch.
    Padding stands on the right whatever the tokenizer prefers: absolute positions then start at the text, and a
    vector does not depend on the texts beside it. A text without tokens gives the zero vector.
    """

    model: Any  # a PreTrainedModel
    pooling: "Pooling"

    def __init__(self, model: nn.Module, pooling: "Pooling", *, pad_id: int):
        super().__init__()
        self.model, self.pooling, self.pad_id = model, pooling, pad_id
        self._reading = Reading()
        for name, module in model.named_modules():
            if name.rsplit(".", 1)[-1] == "pooler":  # never used here; with gradients it would stall DDP
                module.requires_grad_(False)

    @property
    def width(self) -> int:
        return self.pooling.width

    def token_budget(self, device: torch.device) -> int:
        """Padded tokens a group: on a CPU small groups waste less padding at the same speed, a GPU wants them large."""
        return 1024 if device.type == "cpu" else 65_536

    def take_reading(self) -> Reading:
        """What was read since this was last called."""
        reading, self._reading = self._reading, Reading()
        return reading

    def forward(self, tokens: Tokens) -> Float[Tensor, "b d"]:
        device = next(self.parameters()).device
        groups = list(tokens.grouped(self.token_budget(device)))
        if not groups:
            return torch.zeros(0, self.width, device=device)
        pooled = torch.cat([self._group(group, device) for _, group in groups])
        order = torch.cat([index for index, _ in groups])
        return pooled[sent(torch.argsort(order), device)]

    def _group(self, tokens: Tokens, device: torch.device) -> Float[Tensor, "k d"]:
        # A text without tokens is run on a pad token that it sees, so that nothing becomes NaN, and set to zero below.
        lengths = tokens.lengths.clamp(min=1)
        mask = torch.arange(int(lengths.max())) < rearrange(lengths, "b -> b 1")
        empty = rearrange(tokens.lengths == 0, "b -> b 1")
        ids = torch.full(mask.shape, self.pad_id)
        ids[mask & ~empty] = tokens.ids.long()
        texts = end_to_end(self.model, ids[mask], lengths, device, pad_id=self.pad_id)
        self._reading += Reading(len(tokens.ids), mask.numel() if texts is None else len(texts))
        hidden = self._rectangle(ids, mask, device) if texts is None else Places(mask, device).put_back(texts.run())
        return self.pooling(hidden, sent(mask, device)).masked_fill(sent(empty, device), 0.0)

    def _rectangle(
        self, ids: Int[Tensor, "k l"], mask: Bool[Tensor, "k l"], device: torch.device
    ) -> Float[Tensor, "k l d"]:
        with nullcontext() if self.model._compiled_call_impl else skipping(mask, device):
            return self.model(input_ids=sent(ids, device), attention_mask=sent(mask, device).long())[0]


class StaticTable(nn.Module):
    """A table of token vectors and one weight a token: the mean over a text's tokens of weight * vector -> (b, d).

    The weights (Zipf or SIF at the start) are trained beside the table and multiplied into it when the model is saved,
    as `stored_as` says; the parameters are float32 in any case. A text without tokens gives the zero vector.

    While `lent` is not None, texts are read from these rows of the table, which are a parameter of their own: what a step
    does not read costs it nothing.
    """

    lent: nn.Parameter | None

    def __init__(self, table: Float[Tensor, "v d"], weights: Float[Tensor, " v"] | None = None):
        super().__init__()
        self.stored_as: TableFormat = "float32"
        self.table = nn.Parameter(table.float().clone())
        self.weights = nn.Parameter(torch.ones(len(table)) if weights is None else weights.float().clone())
        self.register_parameter("lent", None)
        self._places: Int[Tensor, " v"] | None = None

    @property
    def width(self) -> int:
        return self.table.shape[1]

    def lend(self, used: Int[Tensor, " u"], rows: Float[Tensor, "u d"]) -> None:
        """Read the vectors of the tokens `used` from `rows` until `take_back`; no other token may be read."""
        self._places = torch.full((len(self.table),), -1, device=used.device)
        self._places[used] = torch.arange(len(used), device=used.device)
        self.lent = nn.Parameter(rows)

    def take_back(self) -> None:
        """Read from the table again, which stands as it is."""
        self.lent = self._places = None

    def folded(self) -> Float[Tensor, "v d"]:
        return self.table.detach() * rearrange(self.weights.detach(), "v -> v 1")

    def forward(self, tokens: Tokens) -> Float[Tensor, "b d"]:
        device = self.table.device
        ids, lengths = sent(tokens.ids.long(), device), sent(tokens.lengths.long(), device)
        offsets = lengths.cumsum(0) - lengths
        if self.lent is None or self._places is None:
            table, places = self.table, ids
        else:
            table, places = self.lent, self._places[ids]
        with torch.autocast(device.type, enabled=False):
            total = F.embedding_bag(places, table, offsets, mode="sum", per_sample_weights=self.weights[ids])
            return total / rearrange(lengths.clamp(min=1), "b -> b 1")


class Pooling(nn.Module):
    """Token vectors (b, l, d) and a mask (b, l) -> (b, width), as sentence-transformers pools; several modes are concatenated."""

    def __init__(self, hidden: int, modes: Sequence[PoolingMode] = ("mean",)):
        super().__init__()
        unknown = [mode for mode in modes if mode not in get_args(PoolingMode)]
        if unknown or not modes:
            raise ValueError(f"pooling modes are {', '.join(get_args(PoolingMode))}; got {list(modes)}.")
        self.hidden, self.modes = hidden, tuple(modes)

    @property
    def width(self) -> int:
        return self.hidden * len(self.modes)

    def forward(self, hidden: Float[Tensor, "b l d"], mask: Bool[Tensor, "b l"]) -> Float[Tensor, "b width"]:
        hidden = hidden.float() if hidden.dtype in (torch.float16, torch.bfloat16) else hidden
        return torch.cat([_POOL[mode](hidden, mask) for mode in self.modes], dim=-1)


class Dense(nn.Module):
    """Linear and activation behind the pooling (sentence-transformers' Dense). A projection into the teacher's space is one."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False, activation: nn.Module | None = None):
        super().__init__()
        self.linear = nn.Linear(in_features, out_features, bias=bias)
        self.activation = nn.Identity() if activation is None else activation

    def forward(self, vectors: Float[Tensor, "b d"]) -> Float[Tensor, "b e"]:
        return self.activation(self.linear(vectors))


class Truncate(nn.Module):
    """The first numbers of a vector, as they are: what is cut has length below 1, as sentence-transformers' truncate_dim leaves it."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width

    def forward(self, vectors: Float[Tensor, "b d"]) -> Float[Tensor, "b e"]:
        return vectors[:, : self.width]


class Normalize(nn.Module):
    """Unit rows; a zero row stays zero."""

    def forward(self, vectors: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
        return similarity.normalize(vectors)


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Eval mode, and each part's own mode again afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def _first(mask: Tensor) -> Tensor:
    return mask.int().argmax(dim=1)


def _last(mask: Tensor) -> Tensor:
    return mask.shape[1] - 1 - mask.flip(1).int().argmax(dim=1)


def _at(hidden: Tensor, places: Tensor) -> Tensor:
    return hidden[torch.arange(hidden.shape[0], device=hidden.device), places]


def _sum(hidden: Tensor, weights: Tensor) -> Tensor:
    return reduce(hidden * rearrange(weights.to(hidden.dtype), "b l -> b l 1"), "b l d -> b d", "sum")


def _mean(hidden: Tensor, weights: Tensor, power: float = 1.0) -> Tensor:
    return _sum(hidden, weights) / reduce(weights.to(hidden.dtype), "b l -> b 1", "sum").clamp(min=1e-9) ** power


def _weighted_mean(hidden: Tensor, mask: Tensor) -> Tensor:
    places = repeat(torch.arange(1, mask.shape[1] + 1, device=mask.device), "l -> b l", b=mask.shape[0])
    return _mean(hidden, mask * (places - rearrange(_first(mask), "b -> b 1")))


def _max(hidden: Tensor, mask: Tensor) -> Tensor:
    return hidden.masked_fill(~rearrange(mask, "b l -> b l 1"), float("-inf")).amax(dim=1)


_POOL: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cls": lambda hidden, mask: _at(hidden, _first(mask)),
    "lasttoken": lambda hidden, mask: _at(hidden, _last(mask)),
    "mean": _mean,
    "mean_sqrt_len_tokens": lambda hidden, mask: _mean(hidden, mask, power=0.5),
    "max": _max,
    "weightedmean": _weighted_mean,
}
