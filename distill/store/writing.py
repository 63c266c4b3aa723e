"""Whole stores written at once: from blocks of rows, or another store's rows in fewer bytes."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from distill import files
from distill.errors import DataError, RecipeError
from distill.store.compression import Codec, Format
from distill.store.rows import GOOD, Rows, flags_of, packed
from distill.store.shards import Shard
from distill.store.vectors import Store


def write_store(
    path: str | Path,
    fingerprint: dict[str, Any],
    width: int,
    blocks: Iterable[Rows],
    *,
    rows: int,
    codec: Codec | None = None,
) -> Store:
    """A new store of `rows` rows, which come in blocks. It appears whole or not at all.

    A row that is GOOD and as float16 zero, or not finite, is flagged as that. What a killed call left beside `path` is removed
    by the next. RecipeError if something is there, DataError for blocks whose parts do not fit together, and for a key that comes twice.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.parent / f".{path.name}-lock"):
        files.recover(path)
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise RecipeError(f"{path} is there already. Name a new folder, or delete it.")
        with files.published_folder(path) as temporary:
            made = Store(temporary, fingerprint, width, [], codec)
            made.require_space(rows)
            records: list[Shard] = []
            keys: list[np.ndarray] = []
            for block in blocks:
                rows_here = _checked(block, width)
                keys.append(packed(rows_here.keys))
                records += made.append(rows_here)
            _refuse_repeated(keys)
            made.publish(records)
    return Store.open(path)


def _refuse_repeated(keys: list[np.ndarray]) -> None:
    every = np.concatenate(keys) if keys else np.empty(0)
    _, first = np.unique(every, return_index=True)
    if len(first) < len(every):
        again = np.setdiff1d(np.arange(len(every)), first)
        raise DataError(
            f"{len(again):,} rows have the key of an earlier one, row {again[0]:,} first: a store holds a text once. Leave them out."
        )


def _checked(rows: Rows, width: int) -> Rows:
    parts = {name: np.asarray(part) for name, part in vars(rows).items()}
    count = len(parts["vectors"])
    wanted = {"vectors": (count, width), "keys": (count, 2), "token_counts": (count,), "flags": (count,)}
    wrong = [f"{name} {parts[name].shape}, not {shape}" for name, shape in wanted.items() if parts[name].shape != shape]
    if parts["keys"].dtype != np.uint64:
        wrong.append(f"keys of {parts['keys'].dtype}, not those of text_keys, uint64")
    if wrong:
        raise DataError(f"rows of a store of width {width} have {'; '.join(wrong)}.")
    found = flags_of(parts["vectors"], np.zeros(count, bool))
    return Rows(**{**parts, "flags": np.where(parts["flags"] == GOOD, found, parts["flags"])})


def compress(path: str | Path, new: str | Path, form: str) -> Store:
    """Write the rows of a float16 store into a new one, as int8, pca-K or pca-K-int8; `distortion` says what it cost.

    The codec is fitted to 16,384 rows, evenly spaced. embed() adds to the new store with the same codec. Cost: reads the
    store once; 2ek FLOP a row with PCA.
    """
    source, wanted = Store.open(path), Format.parse(form)
    if source.codec.format.compressed or not wanted.compressed:
        raise RecipeError(
            f"compress makes int8, pca-K or pca-K-int8 of float16, so that what is lost is measured against the teacher; "
            f"{path} holds {source.codec.format}, and {wanted} was asked for."
        )
    codec = source.fit(wanted)
    return write_store(new, source.fingerprint, source.width, source.blocks(), rows=len(source), codec=codec)
