"""Texts into a teacher's vectors: distill's ways, sentence-transformers', and what else can run the teacher."""

import copy
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from distill import hub
from distill.embed import embed
from distill.encoder import Encoder
from distill.export import onnx

Encode = Callable[[], Tensor]
Way = Callable[[Encoder, Sequence[str], Path, int], Encode]
Runtime = Literal["torch.compile", "ONNX Runtime", "ONNX Runtime, int8", "OpenVINO", "OpenVINO, bf16"]


def encode(teacher: Encoder, texts: Sequence[str], folder: Path, batch_size: int) -> Encode:
    return partial(teacher.encode, texts)


def into_store(teacher: Encoder, texts: Sequence[str], folder: Path, batch_size: int) -> Encode:
    """Into a new store in `folder` at each call, and read from there."""
    numbers = itertools.count()
    return lambda: embed(texts, teacher, folder / f"store-{next(numbers)}").vectors(texts)


def sentence_transformers(teacher: Encoder, texts: Sequence[str], folder: Path, batch_size: int) -> Encode:
    """At the teacher's max_length. In bfloat16 its weights are bfloat16 too, as its users run it: autocast would cast them."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(hub.resolve_model(teacher.name).path), device=str(teacher.device))
    model.max_seq_length = teacher.max_length
    if teacher.compute_dtype == "bfloat16":
        model.bfloat16()

    def encode() -> Tensor:
        found: Any = model.encode(list(texts), batch_size=batch_size, show_progress_bar=False, convert_to_tensor=True)
        return found.float().cpu()

    return encode


def compiled(teacher: Encoder, texts: Sequence[str], folder: Path, batch_size: int) -> Encode:
    """torch.compile, one program for all shapes. A compiled model multiplies the padding that is left."""
    model = copy.deepcopy(teacher)
    backbone: Any = model.backbone
    backbone.model.compile(dynamic=True)
    return partial(model.encode, texts)


def by_onnx(name: str, teacher: Encoder, texts: Sequence[str], folder: Path, batch_size: int) -> Encode:
    """ONNX Runtime, in batches of 16 of similar length. NumericsError for int8 that loses too much."""
    return _by_length(onnx.opened(_exported(name, teacher, texts, folder)), texts)


def by_openvino(precision: str, teacher: Encoder, texts: Sequence[str], folder: Path, batch_size: int) -> Encode:
    """OpenVINO on the float32 ONNX file, computing in `precision`, in batches of 16 of similar length."""

    def session(path: Path) -> onnx.Session:
        import openvino

        settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        model = openvino.Core().compile_model(str(path), "CPU", settings)
        return lambda inputs: model(inputs)[0].copy()  # the next call writes where this one did

    return _by_length(onnx.opened(_exported(onnx.FLOAT, teacher, texts, folder), session), texts)


def _exported(name: str, teacher: Encoder, texts: Sequence[str], folder: Path) -> Path:
    folder = folder / Path(name).stem
    if not (folder / onnx.FOLDER).exists():
        onnx.export_onnx(teacher, folder, texts[:32], int8=name == onnx.INT8)
    return folder / onnx.FOLDER / name


def _by_length(vectors_of: Callable[[Sequence[str]], Tensor], texts: Sequence[str]) -> Encode:
    order = torch.tensor(sorted(range(len(texts)), key=lambda number: len(texts[number])))
    back = order.argsort()
    return lambda: vectors_of([texts[number] for number in order.tolist()])[back]


# Each gives a call that computes the vectors of the texts anew, float32, on the CPU; `batch_size` is of sentence-transformers.
RUNTIMES: dict[Runtime, Way] = {
    "torch.compile": compiled,
    "ONNX Runtime": partial(by_onnx, onnx.FLOAT),
    "ONNX Runtime, int8": partial(by_onnx, onnx.INT8),
    "OpenVINO": partial(by_openvino, "f32"),
    "OpenVINO, bf16": partial(by_openvino, "bf16"),
}
WAYS: dict[str, Way] = {
    "distill": encode,
    "distill, into a new store": into_store,
    "sentence-transformers": sentence_transformers,
}


def largest_difference(one: Float[Tensor, "n e"], other: Float[Tensor, "n e"]) -> float:
    """Entry by entry, of unit rows."""
    return float((F.normalize(one) - F.normalize(other)).abs().max())
