"""Whole stores written at once: from blocks of rows, or another store's rows in fewer bytes."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from filelock import FileLock

from distill import files
from distill.errors import RecipeError
from distill.store.compression import Codec, Format
from distill.store.rows import Rows
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

    What a killed call left beside `path` is removed by the next. RecipeError if something is there.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.parent / f".{path.name}-lock"):
        files.recover(path)
        if path.exists() and any(path.iterdir()):
            raise RecipeError(f"{path} is there already. Name a new folder, or delete it.")
        with files.published_folder(path) as temporary:
            made = Store(temporary, fingerprint, width, [], codec)
            made.require_space(rows)
            made.publish([record for block in blocks for record in made.append(block)])
    return Store.open(path)


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
