"""What is left of a model's neighbours and rankings where its vectors are stored in fewer bytes.

The bytes are those of sentence-transformers' `quantize_embeddings`: int8 and uint8 by the range of each number, binary and
ubinary by its sign, eight numbers a byte.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from distill import metrics
from distill.data import Retrieval
from distill.evaluation.scores import Score, Stored, mean_score
from distill.evaluation.tasks import retrieval

Precision = Literal["float32", "int8", "uint8", "binary", "ubinary"]
Encode = Callable[..., Tensor]
K = 10


def quantize(
    vectors: Float[Tensor, "n d"], precision: Precision, ranges: Float[Tensor, "2 d"] | None = None
) -> np.ndarray:
    """Vectors in fewer bytes, bit for bit as sentence-transformers' `quantize_embeddings` makes them.

    int8, uint8: each number's place in `ranges` (lowest and highest a number, of the vectors themselves if not given) in 256
    steps, what lies outside at the ends. binary, ubinary: its sign, eight a byte. Shape (n, d), or (n, d / 8) rounded up.
    """
    if precision not in get_args(Precision):
        raise ValueError(f"a precision is {', '.join(get_args(Precision))}; got {precision!r}.")
    array = vectors.float().cpu().numpy()
    if precision == "float32":
        return array
    if precision in ("binary", "ubinary"):
        packed = np.packbits(array > 0, axis=-1)
        return packed if precision == "ubinary" else (packed ^ 0x80).view(np.int8)
    low, step = _steps(value_ranges(vectors) if ranges is None else ranges)
    placed = np.clip(np.floor((array - low) / step), 0, 255)
    return placed.astype(np.uint8) if precision == "uint8" else (placed - 128).astype(np.int8)


def restore(
    stored: np.ndarray, precision: Precision, width: int, ranges: Float[Tensor, "2 d"] | None = None
) -> Float[Tensor, "n d"]:
    """Vectors whose cosines are those that an index of `quantize`'s bytes compares by.

    int8, uint8 with `ranges`: the middle of each step; without: the whole numbers as they are. binary, ubinary: +1 and -1, whose
    cosine falls with the Hamming distance.
    """
    if precision in ("binary", "ubinary"):
        packed = stored.view(np.uint8) ^ np.uint8(0x80 if precision == "binary" else 0)
        return torch.from_numpy(np.unpackbits(packed, axis=-1)[:, :width].astype(np.float32) * 2 - 1)
    array = torch.from_numpy(stored.astype(np.float32))
    if precision == "float32" or ranges is None:
        return array
    low, step = _steps(ranges)
    return torch.from_numpy((array.numpy() + (128.5 if precision == "int8" else 0.5)) * step + low)


def value_ranges(vectors: Float[Tensor, "n d"]) -> Float[Tensor, "2 d"]:
    """The lowest and the highest of each number of a vector: the ranges of int8 and uint8."""
    return torch.stack([vectors.amin(dim=0), vectors.amax(dim=0)])


def stored_scores(
    system: str,
    encode: Encode,
    precisions: Sequence[Precision],
    texts: Sequence[str],
    role: str | None,
    tasks: Mapping[str, Retrieval],
) -> list[Stored]:
    """Neighbour overlap@10 with the model's own float32 vectors, and nDCG@10 and recall@10 of the retrieval tasks, by precision.

    The overlap is that of more than 20 different texts: among fewer, chance alone shares half of the ten.
    Ranges are those of the texts, and of a task's documents: what an index knows when a query comes. int8 and uint8 are also
    measured raw, as whole numbers without their ranges, which is how vectors from encode(precision="int8") are compared.
    """
    forms: list[tuple[Precision, bool]] = [("float32", False)]
    for precision in precisions:
        forms += [(precision, False)] + ([(precision, True)] if precision.endswith("int8") else [])
    return [_stored(system, encode, precision, raw, texts, role, tasks) for precision, raw in dict.fromkeys(forms)]


def _stored(
    system: str,
    encode: Encode,
    precision: Precision,
    raw: bool,
    texts: Sequence[str],
    role: str | None,
    tasks: Mapping[str, Retrieval],
) -> Stored:
    scores: dict[str, Score] = {}
    size = 0
    if different := list(dict.fromkeys(texts)):
        vectors = encode(different, role=role)
        found, size = _through(vectors, precision, value_ranges(vectors), raw)
        if len(different) > 2 * K:
            scores[f"overlap@{K} with float32"] = mean_score(metrics.neighbour_overlap(found, vectors, K))
    for name, task in tasks.items():
        documents = encode(task.corpus, role="document")
        ranges = value_ranges(documents)
        index, size = _through(documents, precision, ranges, raw)
        queries, _ = _through(encode(task.queries, role="query"), precision, ranges, raw)
        ranked = retrieval(queries, index, task, k=K)
        scores |= {f"{name} {metric}".strip(): score for metric, score in ranked.items()}
    return Stored(system=system, form=f"{precision}{' raw' if raw else ''}", bytes=size, scores=scores)


def _through(
    vectors: Float[Tensor, "n d"], precision: Precision, ranges: Float[Tensor, "2 d"], raw: bool
) -> tuple[Float[Tensor, "n d"], int]:
    """Vectors as they come back from storage, and the bytes of one."""
    stored = quantize(vectors, precision, ranges)
    return restore(stored, precision, vectors.shape[1], None if raw else ranges), stored[:1].nbytes


def _steps(ranges: Float[Tensor, "2 d"]) -> tuple[np.ndarray, np.ndarray]:
    low, high = ranges.float().cpu().numpy()
    step = (high - low) / np.float32(255)
    return low, np.where(step == 0, np.float32(1), step)
