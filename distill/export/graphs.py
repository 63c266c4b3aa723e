"""A student as one module of two tensors, ids and mask, which an exporter can trace: with float32 numbers, or a table in int8."""

import copy

import torch.nn.functional as F
from einops import rearrange, reduce
from jaxtyping import Float, Int
from torch import Tensor, nn

from distill.encoder import Encoder
from distill.modules import Dense, StaticTable, TransformerBackbone
from distill.quantized import int8_rows


def graph(student: Encoder, *, int8: bool) -> nn.Module:
    """A copy of the student on the CPU; with `int8` its token table and Dense layers are kept as int8."""
    backbone, head = copy.deepcopy(student.backbone).cpu().float(), copy.deepcopy(student.head).cpu().float()
    for layer in head if int8 else ():
        if isinstance(layer, Dense):
            layer.linear = _Int8Linear(layer.linear)  # type: ignore[assignment]
    if isinstance(backbone, StaticTable):
        table = backbone.folded()
        return _TableGraph(_Int8Rows(table) if int8 else nn.Embedding.from_pretrained(table), head).eval()
    if int8:
        backbone.model.set_input_embeddings(_Int8Rows(backbone.model.get_input_embeddings().weight.detach()))
    return _Graph(backbone, head).eval()


class _Graph(nn.Module):
    """Ids and mask -> vectors, as an Encoder computes them, on rows that are padded."""

    def __init__(self, backbone: TransformerBackbone, head: nn.Sequential) -> None:
        super().__init__()
        self.model, self.pooling, self.head = backbone.model, backbone.pooling, head

    def forward(self, input_ids: Int[Tensor, "b l"], attention_mask: Int[Tensor, "b l"]) -> Float[Tensor, "b width"]:
        mask = attention_mask.bool()
        empty = ~mask.any(dim=1, keepdim=True)  # run on padding that it sees, and set to zero, as in the backbone
        mask = mask | empty
        hidden = self.model(input_ids=input_ids, attention_mask=mask.long())[0]
        return self.head(self.pooling(hidden, mask).masked_fill(empty, 0.0))


class _TableGraph(nn.Module):
    """The same of a static table: the mean of a text's rows."""

    def __init__(self, table: nn.Module, head: nn.Sequential) -> None:
        super().__init__()
        self.table, self.head = table, head

    def forward(self, input_ids: Int[Tensor, "b l"], attention_mask: Int[Tensor, "b l"]) -> Float[Tensor, "b width"]:
        mask = rearrange(attention_mask.float(), "b l -> b l 1")
        total = reduce(self.table(input_ids) * mask, "b l d -> b d", "sum")
        return self.head(total / reduce(mask, "b l 1 -> b 1", "sum").clamp(min=1.0))


class _Int8Rows(nn.Module):
    """An embedding whose rows are whole numbers with a scale each (`quantized.int8_rows`)."""

    values: Tensor
    scales: Tensor

    def __init__(self, table: Float[Tensor, "v d"]) -> None:
        super().__init__()
        values, scales = int8_rows(table)
        self.register_buffer("values", values)
        self.register_buffer("scales", scales)

    def forward(self, ids: Int[Tensor, "b l"]) -> Float[Tensor, "b l d"]:
        return self.values[ids].float() * rearrange(self.scales[ids], "b l -> b l 1")


class _Int8Linear(_Int8Rows):
    """A linear layer whose weights are kept so; what comes in stays float: a text's neighbours must not set its scale."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.weight.detach())
        self.bias = linear.bias

    def forward(self, vectors: Float[Tensor, "b d"]) -> Float[Tensor, "b e"]:
        return F.linear(vectors, self.values.float() * rearrange(self.scales, "e -> e 1"), self.bias)
