"""Stores of several teachers read side by side, and the store that is written from them. The ways to join are in `methods`."""

import hashlib
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from distill.errors import DataError, RecipeError
from distill.similarity import normalize, pairwise_cosine
from distill.store.compression import PAIR_ROWS, spread
from distill.store.rows import GOOD, ZERO, Rows, packed, text_keys
from distill.store.shards import MANIFEST, SHARD_ROWS
from distill.store.vectors import Store
from distill.store.writing import write_store

BLOCK = 4096
TOKENS = 65_536  # ids of tokens that are looked for at once
Units = list[Tensor]  # unit rows of the same texts, one matrix (b, e) a teacher


@dataclass(frozen=True, eq=False)
class Joined:
    """A joined store, and how well it stands for its teachers, measured on at most 512 of its rows.

    matrix: what takes the teachers' unit rows, side by side, to a joined row, but for its length.
    left_out: texts that not every store holds. set_aside: rows that are not good in every store, flagged here.
    error: mean |cosine of two joined rows - weighted mean of the teachers' cosines|; errors: the same to each teacher alone.
    to_first: mean cosine of a row to the first teacher's, where the widths are equal.
    """

    store: Store
    matrix: Float[Tensor, "w e"]
    left_out: int
    set_aside: int
    error: float
    errors: tuple[float, ...]
    to_first: float | None

    def __str__(self) -> str:
        near = "" if self.to_first is None else f"; cosine to the first teacher {self.to_first:.4f}"
        return (
            f"{self.store.path}: {len(self.store):,} vectors of width {self.store.width}; {self.left_out:,} texts left out, "
            f"{self.set_aside:,} set aside\ncosines of pairs are off by {self.error:.4f} from the weighted mean of the "
            f"teachers', by {', '.join(f'{error:.4f}' for error in self.errors)} from each one's{near}"
        )


@dataclass(frozen=True, eq=False)
class Sources:
    """Stores and, of each text that all of them hold: its row in each, its key in the first, whether it is good in all.

    `named` is its key in each: a teacher with prompts of its own has another, and another vector by another prompt.
    """

    stores: Sequence[Store]
    weights: list[float]
    rows: list[np.ndarray]
    named: list[np.ndarray]
    flags: np.ndarray
    left_out: int

    @property
    def keys(self) -> np.ndarray:
        return self.named[0]

    def units(self, chosen: np.ndarray) -> Units:
        """Unit rows of these texts, by teacher."""
        return [normalize(store.take(rows[chosen])) for store, rows in zip(self.stores, self.rows, strict=True)]

    def good(self, most: int | None = None) -> np.ndarray:
        """Numbers of the texts that are good in all stores, at most so many, evenly spaced."""
        good = np.flatnonzero(self.flags == GOOD)
        return good if most is None else good[spread(len(good), most)]

    def moments(self) -> Float[Tensor, "w w"]:
        """X'X of the good texts' unit rows, all teachers' side by side and without weights, in float64."""
        good, total = self.good(), torch.zeros((), dtype=torch.float64)
        for start in range(0, len(good), BLOCK):
            rows = torch.cat(self.units(good[start : start + BLOCK]), dim=1).double()
            total = total + rows.T @ rows
        return total

    def blocks(self, matrix: Float[Tensor, "w e"]) -> Iterator[Rows]:
        """Joined rows, a shard at a time. What is not good in every store is zeros, with the flag of the first that says so."""
        for start in range(0, len(self.keys), SHARD_ROWS):
            here = np.arange(start, min(start + SHARD_ROWS, len(self.keys)))
            vectors = np.concatenate([self._block(here[at : at + BLOCK], matrix) for at in range(0, len(here), BLOCK)])
            flags = np.where((self.flags[here] == GOOD) & ~vectors.any(axis=1), ZERO, self.flags[here])
            yield Rows(vectors, self.keys[here], self.stores[0].token_counts[self.rows[0][here]], flags)

    def _block(self, chosen: np.ndarray, matrix: Float[Tensor, "w e"]) -> np.ndarray:
        joined = normalize(side_by_side(self.units(chosen), matrix))
        joined[torch.from_numpy(self.flags[chosen] != GOOD)] = 0.0
        return joined.numpy().astype(np.float16)

    def fingerprint(self, method: str, width: int) -> dict[str, Any]:
        """What the joined vectors depend on: method, weights, every source, and the texts, which the maps are fitted to."""
        alike = all(np.array_equal(some, self.keys) for some in self.named)
        rows = np.concatenate(self.named[: 1 if alike else None], axis=1)
        texts = hashlib.sha256(np.sort(rows.view(f"S{rows.shape[1] * 8}").reshape(-1)).tobytes()).hexdigest()
        named = {f"teacher {number}": store.identity for number, store in enumerate(self.stores, start=1)}
        weights = " ".join(f"{weight:.9g}" for weight in self.weights)
        return {"joined": method, "width": width, "weights": weights, "texts": texts} | named


def side_by_side(units: Units, matrix: Float[Tensor, "w e"]) -> Float[Tensor, "b e"]:
    """Unit rows side by side, times the matrix. One that only scales them, as `concatenate`'s, takes no product."""
    rows, read = torch.cat(units, dim=1), matrix.any(dim=1)
    scale = matrix[read].diagonal()
    return rows[:, read] * scale if torch.equal(scale.diag(), matrix[read]) else rows @ matrix


def read_together(
    stores: Sequence[Store], weights: Sequence[float] | None, keys: Sequence[np.ndarray] | None
) -> Sources:
    """The texts that all stores hold, by their keys in each, or by the keys that all have in common. See `methods.concatenate`."""
    if len(stores) < 2:
        raise RecipeError(f"two stores or more are joined, got {len(stores)}.")
    keys = [_text_keys_of(stores)] * len(stores) if keys is None else keys
    if len(keys) != len(stores) or len({len(some) for some in keys}) > 1:
        raise RecipeError(
            f"keys name the same texts in each of {len(stores)} stores, got {', '.join(str(len(some)) for some in keys)} keys."
        )
    _, first = np.unique(packed(keys[0]), return_index=True)
    first.sort()
    rows = [store.find(some[first]) for store, some in zip(stores, keys, strict=True)]
    held = np.all([found >= 0 for found in rows], axis=0)
    if not held.any():
        raise DataError(
            f"no text is in all of {', '.join(str(store.path) for store in stores)}. A key is of prompt and text: for teachers "
            "with different prompts give keys=[keys_by_role(texts, teacher), ...], or --texts and --teachers."
        )
    rows, named = [found[held] for found in rows], [some[first][held] for some in keys]
    flags = _flags(stores, rows)
    if not (flags == GOOD).any():
        raise DataError(f"none of {len(named[0]):,} texts has a good vector in every store; there is nothing to join.")
    return Sources(stores, shares(weights, len(stores)), rows, named, flags, int((~held).sum()))


def write_joined(sources: Sources, path: str | Path | None, method: str, matrix: Float[Tensor, "w e"]) -> Joined:
    """Write the joined store, unless it stands already, and judge it."""
    width = matrix.shape[1]
    fingerprint = sources.fingerprint(method, width)
    if path is None:
        beside, digest = sources.stores[0].path, hashlib.sha256(repr(fingerprint).encode()).hexdigest()
        path = beside.with_name(f"{beside.name}-joined-{digest[:12]}")
    if not (Path(path) / MANIFEST).exists() or Store.open(path).fingerprint != fingerprint:
        write_store(path, fingerprint, width, sources.blocks(matrix), rows=len(sources.keys))
    return _judged(sources, Store.open(path), matrix)


def _text_keys_of(stores: Sequence[Store]) -> np.ndarray:
    """Keys that any store holds, without those of tokens: token 5 of another tokenizer is another token."""
    keys = np.concatenate([store.keys for store in stores])
    for start in itertools.count(step=TOKENS):
        tokens = text_keys(map(str, range(start, start + TOKENS)), kind="token")
        found = np.isin(packed(keys), packed(tokens))
        if not found.any():
            return keys
        keys = keys[~found]
    return keys


def shares(weights: Sequence[float] | None, count: int) -> list[float]:
    """Weights that add up to 1."""
    given = [1.0] * count if weights is None else [float(weight) for weight in weights]
    if len(given) != count or not all(0 <= weight < math.inf for weight in given) or not sum(given) > 0:
        raise RecipeError(
            f"{count} stores have {count} weights of 0 or more, one of them above 0, got {' '.join(map(str, given))}."
        )
    return [weight / sum(given) for weight in given]


def _flags(stores: Sequence[Store], rows: Sequence[np.ndarray]) -> np.ndarray:
    """The flag of the first store in which a row is not good."""
    flags = np.full(len(rows[0]), GOOD, np.uint8)
    for store, found in zip(stores, rows, strict=True):
        flags = np.where(flags == GOOD, store.flags[found], flags)
    return flags


def _judged(sources: Sources, store: Store, matrix: Float[Tensor, "w e"]) -> Joined:
    chosen = sources.good(PAIR_ROWS)
    units, joined = sources.units(chosen), normalize(store.take(store.find(sources.keys[chosen])))
    grams = torch.stack([rows @ rows.T for rows in units])
    mean = (torch.tensor(sources.weights)[:, None, None] * grams).sum(0)
    apart = (torch.cat([mean[None], grams]) - joined @ joined.T).abs()
    apart.diagonal(dim1=1, dim2=2).zero_()
    error, *errors = (apart.sum(dim=(1, 2)) / max(1, len(chosen) * (len(chosen) - 1))).tolist()
    near = pairwise_cosine(joined, units[0]).mean().item() if store.width == sources.stores[0].width else None
    return Joined(store, matrix, sources.left_out, int((store.flags != GOOD).sum()), error, tuple(errors), near)
