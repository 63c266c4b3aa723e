"""Rows of a store in fewer bytes: int8, the first k principal components, or both; and what that costs.

A format is written "float16", "int8", "pca-256" (256 components in float16) or "pca-256-int8". Its codec is fitted once, to
rows of the store, and then gives every row the same bits, whoever writes it and whatever rows come with it.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from distill.alignment import principal_directions
from distill.errors import DataError, RecipeError
from distill.similarity import evenly_spaced, normalize

FIT_ROWS = 16_384  # rows that a codec is fitted to
PAIR_ROWS = 512  # rows of a shard whose cosines to each other are compared
BLOCK = 4096
DEVIATIONS = 4.5  # of a column to either side that int8 reaches at least
_NAME = re.compile(r"(?:pca-(?P<components>[1-9][0-9]{0,6}))?-?(?P<dtype>float16|int8)?")


@dataclass(frozen=True)
class Format:
    """How a store keeps its vectors: the dtype of a column, and how many principal components are columns (None: all of e)."""

    dtype: Literal["float16", "int8"] = "float16"
    components: int | None = None

    @classmethod
    def parse(cls, name: str) -> "Format":
        """The format of a name. RecipeError for any other text."""
        found = _NAME.fullmatch(name) if name else None
        given = cls(found["dtype"] or "float16", int(found["components"] or 0) or None) if found else None  # type: ignore[arg-type]
        if given is None or name not in (str(given), f"{given}-float16"):
            raise RecipeError(
                f'a store keeps vectors as float16, int8, pca-K or pca-K-int8 ("pca-256"), not as {name!r:.60}.'
            )
        return given

    def __str__(self) -> str:
        if self.components is None:
            return self.dtype
        return f"pca-{self.components}" + ("" if self.dtype == "float16" else f"-{self.dtype}")

    @property
    def compressed(self) -> bool:
        """Whether it is anything but plain float16."""
        return self != Format()

    def columns(self, width: int) -> int:
        """Columns of a stored row of width e. RecipeError if there are not fewer components than that."""
        if self.components is None:
            return width
        if self.components >= width:
            raise RecipeError(
                f"{self} keeps {self.components} of {width} columns; fewer than {width} is what it is for. Use {self.dtype}."
            )
        return self.components

    def row_bytes(self, width: int) -> int:
        return self.columns(width) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Distortion:
    """What storing `rows` rows cost: 1 - cosine of a row to its original, mean and worst; mean |error| of cosines between rows."""

    rows: int
    mean: float
    worst: float
    pairs: float

    @classmethod
    def over(cls, parts: Sequence["Distortion"]) -> "Distortion | None":
        """Of several shards together; None if there are no rows in them."""
        total = sum(part.rows for part in parts)
        if not total:
            return None
        mean, pairs = (sum(getattr(p, name) * p.rows for p in parts) / total for name in ("mean", "pairs"))
        return cls(total, mean, max(part.worst for part in parts), pairs)

    def __str__(self) -> str:
        return f"1 - cosine {self.mean:.1e} on average, {self.worst:.1e} at worst; cosines of pairs off by {self.pairs:.1e}"


@dataclass(frozen=True, eq=False)
class Codec:
    """Rows of width e to k columns of a dtype, and back.

    rotation (k, e), orthonormal rows, is that of PCA. centre and scale (k) are those of int8: a column holds
    round((x - centre) / scale), in -127..127. What the format has no use for is None.
    """

    width: int
    format: Format = Format()
    rotation: np.ndarray | None = None
    centre: np.ndarray | None = None
    scale: np.ndarray | None = None

    @property
    def columns(self) -> int:
        return self.format.columns(self.width)

    def arrays(self) -> dict[str, np.ndarray]:
        """What has to be kept beside the rows; nothing for float16."""
        named = {"rotation": self.rotation, "centre": self.centre, "scale": self.scale}
        return {name: array for name, array in named.items() if array is not None}

    def encode(self, vectors: np.ndarray) -> np.ndarray:
        """Vectors (n, e) to columns (n, k). A row that is not finite becomes zeros: its flag says what it was."""
        if not self.format.compressed:
            with np.errstate(over="ignore"):
                return np.ascontiguousarray(vectors, dtype=np.float16)
        out = np.empty((len(vectors), self.columns), self.format.dtype)
        for start in range(0, len(vectors), BLOCK):
            out[start : start + BLOCK] = self._encode(finite_rows(vectors[start : start + BLOCK]))
        return out

    def decode(self, columns: np.ndarray) -> np.ndarray:
        """Columns (n, k), already float32, to vectors (n, e); overwrites `columns`. Cost: 2nke FLOP with PCA, else O(nk)."""
        if self.scale is not None and self.centre is not None:
            columns *= self.scale
            columns += self.centre
        if self.rotation is None:
            return columns
        return (torch.from_numpy(columns) @ torch.from_numpy(self.rotation)).numpy()

    def _encode(self, rows: np.ndarray) -> np.ndarray:
        if self.rotation is not None:
            rows = _coordinates(rows, self.rotation)
        if self.scale is None:
            return rows.astype(np.float16)
        return np.rint((rows - self.centre) / self.scale).clip(-127, 127).astype(np.int8)


def fit(form: Format, vectors: np.ndarray) -> Codec:
    """The codec of a format for rows like `vectors` (n, e), finite and not zero. DataError if they are too few.

    PCA takes the k directions in which unit rows lose least, the first eigenvectors of their second moments: about zero,
    not about the mean, because cosines are. int8 has a centre and a range for each column (`_ranges`).
    O(n e^2 + e^3) FLOP.
    """
    width, least = vectors.shape[1], form.columns(vectors.shape[1]) if form.components else 1
    if len(vectors) < least:
        raise DataError(
            f"{form} is fitted to {least:,} rows or more, got {len(vectors):,} that are finite and not zero. "
            "Give more texts at first, or store as float16 or int8."
        )
    if not form.compressed:
        return Codec(width)
    rotation = _principal(vectors, form.components) if form.components else None
    if form.dtype == "float16":
        return Codec(width, form, rotation)
    rows = vectors if rotation is None else _coordinates(vectors, rotation)
    centre, scale = _ranges(rows)
    return Codec(width, form, rotation, centre, scale)


def measure(vectors: np.ndarray, columns: np.ndarray, codec: Codec) -> Distortion:
    """What the columns (n, k) that were written lost of the vectors (n, e), all of them finite and not zero."""
    if not len(vectors):
        return Distortion(0, 0.0, 0.0, 0.0)
    losses = np.concatenate([*_losses(vectors, columns, codec)])
    chosen = spread(len(vectors), PAIR_ROWS)
    here, there = normalize(_tensor(vectors[chosen])), normalize(_decoded(columns[chosen], codec))
    apart = (here @ here.T - there @ there.T).abs().fill_diagonal_(0.0).double().sum().item()
    pairs = apart / max(1, len(chosen) * (len(chosen) - 1))
    return Distortion(len(losses), float(losses.mean()), float(losses.max()), pairs)


def spread(count: int, most: int) -> np.ndarray:
    """Numbers of at most `most` of `count` things, evenly spaced: sorted files are sampled from end to end."""
    return np.array(evenly_spaced(count, most), np.int64)


def finite_rows(vectors: np.ndarray) -> np.ndarray:
    """Rows (n, e) in float32, those that are not finite as zeros."""
    rows = np.array(vectors, np.float32)
    rows[~np.isfinite(rows).all(axis=1)] = 0.0
    return rows


def _principal(vectors: np.ndarray, components: int) -> np.ndarray:
    """(k, e): eigenvectors of the second moments of unit rows, largest first, each with its largest entry positive."""
    moments = torch.zeros(vectors.shape[1], vectors.shape[1], dtype=torch.float64)
    for start in range(0, len(vectors), BLOCK):
        rows = normalize(_tensor(vectors[start : start + BLOCK])).double()
        moments += rows.T @ rows
    return principal_directions(moments, components).T.contiguous().float().numpy()


def _coordinates(rows: np.ndarray, rotation: np.ndarray) -> np.ndarray:
    """Coordinates (n, k), stretched to the length of the row: what PCA drops turns a vector, and does not shorten it.

    In float64: a product of float32 in another order, as in a batch of another size, would move the last bit of a float16.
    """
    rows = rows.astype(np.float64)
    inside = rows @ rotation.T.astype(np.float64)
    lengths, kept = (np.linalg.norm(array, axis=1, keepdims=True) for array in (rows, inside))
    return inside * np.divide(lengths, kept, out=np.ones_like(kept), where=kept > 0)


def _ranges(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Centre and scale (k) of each column: its mean, and a range of 4.5 standard deviations, more if it holds more.

    1 - cosine of all-mpnet-base-v2's unit rows that it was not fitted to, mean and worst: 5.0e-5 and 3.4e-4. The largest
    value alone: 4.5e-5 and 9.0e-4; least squares: 4.5e-5 and 1.2e-3; a .999 quantile: 9.6e-5 and 3.5e-3; one scale for all:
    1.1e-4 and 8.5e-4. Fitted to 64 rows: 5.2e-5 and 1.0e-3, the largest value alone 2.1e-3 and 1.2e-2.
    """
    centre = rows.mean(axis=0, dtype=np.float64)
    apart = rows - centre
    reach = np.maximum(DEVIATIONS * apart.std(axis=0), np.abs(apart).max(axis=0))
    scale = np.where(reach > 0, reach, 1.0) / 127  # a column that never moves is its centre
    return centre.astype(np.float32), scale.astype(np.float32)


def _losses(vectors: np.ndarray, columns: np.ndarray, codec: Codec) -> Iterator[np.ndarray]:
    """1 - cosine of each row: half the squared distance of unit rows, which float32 holds where 1 - cosine is lost in rounding."""
    for start in range(0, len(vectors), BLOCK):
        here = normalize(_tensor(vectors[start : start + BLOCK]))
        there = normalize(_decoded(columns[start : start + BLOCK], codec))
        yield ((here - there).square().sum(dim=1) / 2).double().numpy()


def _decoded(columns: np.ndarray, codec: Codec) -> torch.Tensor:
    return torch.from_numpy(codec.decode(columns.astype(np.float32)))


def _tensor(vectors: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(vectors, np.float32))
