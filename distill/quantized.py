"""A token table in fewer bytes, as a model folder holds it: float16, or int8 with one scale a row; and how it is read again.

sentence-transformers opens a float16 table as it is. It has no module for int8: such a folder names `Int8Embedding` of this
file, which needs distill to be installed, and `trust_remote_code=True` from sentence-transformers 6 on.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from einops import rearrange
from jaxtyping import Float, Int8
from torch import Tensor

TableFormat = Literal["float32", "float16", "int8"]
INT8_MODULE = "distill.quantized.Int8Embedding"  # the type in modules.json
_LARGEST = 127


def int8_rows(table: Float[Tensor, "v d"]) -> tuple[Int8[Tensor, "v d"], Float[Tensor, " v"]]:
    """Rows as whole numbers -127..127, and the scale of each: table = values * scale, to half a scale in every place.

    A scale is the row's largest entry / 127; a row of zeros has 0. What `float_rows` gives back has the same values and scales.
    """
    if not table.isfinite().all():
        raise ValueError(f"int8 rows hold finite numbers; a table {tuple(table.shape)} has others.")
    scales = table.abs().amax(dim=1) / _LARGEST
    divisors = torch.where(scales > 0, scales, torch.ones_like(scales))
    return torch.round(table / rearrange(divisors, "v -> v 1")).to(torch.int8), scales


def float_rows(values: Int8[Tensor, "v d"], scales: Float[Tensor, " v"]) -> Float[Tensor, "v d"]:
    """The table that `int8_rows` was given, as far as it was kept."""
    return values.float() * rearrange(scales.float(), "v -> v 1")


def table_tensors(table: Float[Tensor, "v d"], form: TableFormat) -> dict[str, Tensor]:
    """What model.safetensors holds of a table."""
    if form == "int8":
        values, scales = int8_rows(table)
        return {"embedding.int8": values, "embedding.scale": scales}
    return {"embedding.weight": stored(table, form)}


def read_table(tensors: Mapping[str, Tensor]) -> Float[Tensor, "v d"] | None:
    """The float32 table of a model.safetensors; None if it holds no table, ValueError if its parts do not fit."""
    values, scales = tensors.get("embedding.int8"), tensors.get("embedding.scale")
    if values is None or scales is None:
        return tensors["embedding.weight"].float() if "embedding.weight" in tensors else None
    if values.dtype != torch.int8 or values.ndim != 2 or scales.shape != values.shape[:1]:
        raise ValueError(
            f"an int8 table is (v, d) with v scales, got {values.dtype} {tuple(values.shape)} and {tuple(scales.shape)}"
        )
    return float_rows(values, scales)


def kept_table(table: Float[Tensor, "v d"], form: TableFormat) -> Float[Tensor, "v d"]:
    """What `read_table` gives of `table_tensors`."""
    return float_rows(*int8_rows(table)) if form == "int8" else stored(table, form).float()


def stored(weights: Tensor, form: TableFormat) -> Tensor:
    """A table that is not int8, or the weights of a Dense layer behind any table: float16 unless all is float32."""
    return (weights if form == "float32" else weights.half()).contiguous()


class Int8Embedding:
    """What sentence-transformers loads for an int8 table: its own StaticEmbedding, with the table in float32."""

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        subfolder: str = "",
        token: bool | str | None = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        **_: Any,
    ) -> Any:
        from sentence_transformers.sentence_transformer.modules import StaticEmbedding
        from tokenizers import Tokenizer

        source: dict[str, Any] = {
            "subfolder": subfolder,
            "token": token,
            "cache_folder": cache_folder,
            "revision": revision,
        }
        source |= {"local_files_only": local_files_only}
        path = StaticEmbedding.load_file_path(model_name_or_path, filename="tokenizer.json", **source)
        table = read_table(StaticEmbedding.load_torch_weights(model_name_or_path, **source))
        if table is None or path is None:
            raise ValueError(
                f"{model_name_or_path} holds no int8 table (embedding.int8, embedding.scale) beside a tokenizer.json."
            )
        return StaticEmbedding(Tokenizer.from_file(path), embedding_weights=table)
