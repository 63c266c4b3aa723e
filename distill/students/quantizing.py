"""How a static student's table is stored, and what that costs."""

from dataclasses import asdict, dataclass
from typing import Any, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from distill.encoder import Encoder
from distill.errors import RecipeError
from distill.modules import Dense, StaticTable
from distill.quantized import TableFormat, kept_table, stored, table_tensors
from distill.similarity import normalize

BLOCK = 4096


@dataclass(frozen=True)
class TableCost:
    """A table in its stored form: bytes of table and Dense layers, as float32 and as stored, and what they lose.

    mean and worst are of 1 - cosine between a token's vector, behind the Dense layers, and the same in float32. A text is a
    mean of tokens, and loses less.
    """

    form: TableFormat
    tokens: int
    float32_bytes: int
    bytes: int
    mean: float
    worst: float

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"{self.form}: {self.tokens:,} tokens in {self.bytes / 1e6:.2f} MB with the projection, {self.float32_bytes / 1e6:.2f} MB "
            f"as float32; 1 - cosine of a token's vector {self.mean:.1e} on average, {self.worst:.1e} at worst"
        )


def quantize(student: Encoder, form: TableFormat = "int8") -> TableCost:
    """Have a static student's table stored as int8 with one scale a row, or float16, whenever it is saved; its cost now.

    Nothing changes in memory: it is trained and measured in float32, and can be quantized before. Dense layers are stored
    as float16 beside either. sentence-transformers opens a float16 folder as any other, and gives float16 vectors, of NaN for
    a text without tokens: `SentenceTransformer(folder).float()` gives float32 vectors, and zeros. It opens an int8 folder
    where distill is installed, from version 6 on with trust_remote_code=True.
    """
    if form not in get_args(TableFormat):
        raise RecipeError(f"a table is stored as {', '.join(get_args(TableFormat))}, got {form!r}.")
    _table(student).stored_as = form
    return table_cost(student)


@torch.no_grad()
def table_cost(student: Encoder) -> TableCost:
    """What the form costs that a static student's table is stored in. Cost: each token through the Dense layers, twice."""
    table, dense = _table(student), [layer for layer in student.head if isinstance(layer, Dense)]
    exact, form = table.folded(), table.stored_as
    pairs = zip(exact.split(BLOCK), kept_table(exact, form).split(BLOCK), strict=True)
    lost = torch.cat([_apart(_behind(one, dense, "float32"), _behind(two, dense, form)) for one, two in pairs])
    weights = [parameter for layer in dense for parameter in layer.parameters()]
    sizes = [tensor.numel() * tensor.element_size() for tensor in table_tensors(exact, form).values()]
    sizes += [parameter.numel() * stored(parameter, form).element_size() for parameter in weights]
    whole = 4 * sum(tensor.numel() for tensor in [exact, *weights])
    return TableCost(form, len(exact), whole, sum(sizes), float(lost.mean()), float(lost.max()))


def _table(student: Encoder) -> StaticTable:
    if not isinstance(student.backbone, StaticTable):
        raise RecipeError(f"{student.name} is no static table; a transformer is exported in float32.")
    return student.backbone


def _behind(rows: Float[Tensor, "k d"], dense: list[Dense], form: TableFormat) -> Float[Tensor, "k e"]:
    """Unit rows behind Dense layers that are stored in a form."""
    for layer in dense:
        bias = None if layer.linear.bias is None else stored(layer.linear.bias, form).float()
        rows = layer.activation(nn.functional.linear(rows, stored(layer.linear.weight, form).float(), bias))
    return normalize(rows)


def _apart(one: Float[Tensor, "k e"], two: Float[Tensor, "k e"]) -> Float[Tensor, " k"]:
    """1 - cosine of unit rows, as half their squared distance: float32 loses the other form in rounding."""
    return ((one - two).square().sum(dim=1) / 2).double()
