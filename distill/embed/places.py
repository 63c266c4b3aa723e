"""Where a teacher's store lies, and how it is made: by its fingerprint, in the format asked for."""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from distill import distributed, files
from distill.embed.job import not_writable
from distill.encoder import Encoder
from distill.errors import IntegrityError, RecipeError, ResourceError
from distill.hub import cache_home
from distill.identity import Compute, recognize
from distill.store import Format, Rows, Store, compression, text_keys
from distill.store.shards import MANIFEST, SAMPLE, Shard, read_manifest
from distill.store.vectors import refuse_other_fingerprint


def default_store(teacher: Encoder, store_as: str | None = None) -> Path:
    """Where a teacher's vectors lie when no folder is named: the cache, by teacher, fingerprint and format."""
    return _place_of(teacher, teacher.fingerprint(), store_as)


def _place_of(teacher: Encoder, fingerprint: dict[str, Any], store_as: str | None) -> Path:
    name = f"{Path(teacher.name).name}-{hashlib.sha256(repr(sorted(fingerprint.items())).encode()).hexdigest()[:12]}"
    form = Format.parse(store_as or "float16")
    return cache_home() / "stores" / (f"{name}-{form}" if form.compressed else name)


def place(
    path: str | Path | None, teacher: Encoder, keys: np.ndarray, compute: Compute, store_as: str | None = None
) -> Path:
    """The folder that was named, or the teacher's own in the cache."""
    return Path(path) if path is not None else distributed.main_first(partial(_own, teacher, keys, compute, store_as))


def _own(teacher: Encoder, keys: np.ndarray, compute: Compute, store_as: str | None) -> Path:
    """`default_store`; if there is none yet, one that another release's description of the teacher named."""
    fingerprint = teacher.fingerprint()
    own = _place_of(teacher, fingerprint, store_as)
    if (own / MANIFEST).exists():
        return own
    form = Format.parse(store_as or "float16")
    for manifest in sorted(own.parent.glob(f"{Path(teacher.name).name}-*/{MANIFEST}")):
        with suppress(IntegrityError, ResourceError):
            same_format = read_manifest(manifest.parent).format == form
            if same_format and recognize(manifest.parent, teacher, fingerprint, keys, compute):
                return manifest.parent
    return own


def prepare(path: Path, teacher: Encoder, keys: np.ndarray, compute: Compute) -> Store:
    """The store at `path`, made if it is not there by the main process; every process opens it by itself."""
    distributed.main_first(partial(_create, path, teacher, keys, compute))
    return Store.open(path)


def _create(path: Path, teacher: Encoder, keys: np.ndarray, compute: Compute) -> None:
    fingerprint = teacher.fingerprint()
    try:
        recognize(path, teacher, fingerprint, keys, compute)
        Store.open_or_create(path, fingerprint, teacher.width)
        if (path / SAMPLE / MANIFEST).exists():
            _take_in_sample(path)
    except PermissionError as error:
        raise not_writable(path, error) from error


def lacks_codec(path: Path, store_as: str, width: int) -> bool:
    """Whether there is no store yet and one with a codec is wanted. RecipeError if there is one of another format."""
    wanted = Format.parse(store_as)
    wanted.columns(width)
    if not (path / MANIFEST).exists():
        return wanted.compressed
    found = read_manifest(path).format
    if found != wanted:
        way = f"python -m distill.store compress {path} NEW --as {wanted}" if not found.compressed else "embed anew"
        raise RecipeError(
            f"{path} holds its vectors as {found}, and {wanted} was asked for. Leave that out, or make another store of it: {way}."
        )
    return False


def make_compressed(path: Path, store_as: str, texts: Sequence[str], prompt: str, embed: Callable[..., Store]) -> None:
    """Make an empty store whose codec is fitted to some of the texts, evenly spaced.

    These are embedded first, into a float16 store inside it, which `_create` takes in and deletes: no text is computed
    twice. Killed at any point, the next call goes on from there to the same bits.
    """
    chosen = [texts[number] for number in compression.spread(len(texts), compression.FIT_ROWS)]
    sample = embed(chosen, path=path / SAMPLE)
    rows = sample.find(text_keys(chosen, prompt=prompt))
    distributed.main_first(partial(_create_fitted, path, Format.parse(store_as), sample, rows))


def _create_fitted(path: Path, form: Format, sample: Store, rows: np.ndarray) -> None:
    Store.open_or_create(path, sample.fingerprint, sample.width, codec=sample.fit(form, rows))


def _take_in_sample(path: Path) -> None:
    """Write the rows of the sample into the store around it, and delete the sample."""
    with Store.open(path).lock():
        if not (path / SAMPLE / MANIFEST).exists():
            return
        store, sample = Store.open(path), Store.open(path / SAMPLE)
        refuse_other_fingerprint(path / SAMPLE, sample.fingerprint, store.fingerprint)
        store.remove_orphans()
        store.require_space(len(sample))
        written: list[Shard] = []
        for rows in sample.blocks():
            new = store.find(rows.keys) < 0
            written += store.append(Rows(*(column[new] for column in vars(rows).values())))
        store.publish(written)
        files.remove_folder(path / SAMPLE)
