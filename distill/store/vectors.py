"""The store: its rows found by key and read through memory maps, and shards that are written and then published."""

import hashlib
import json
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from jaxtyping import Float
from safetensors.numpy import save_file
from torch import Tensor

from distill import files
from distill.errors import IntegrityError, RecipeError, ResourceError
from distill.store import compression, shards
from distill.store.compression import Codec, Distortion, Format
from distill.store.rows import GOOD, NOT_FINITE, ZERO, Rows, packed, text_keys
from distill.store.shards import JOB, MANIFEST, SAMPLE, SHARD_ROWS, CodecFile, Manifest, Shard, forget


class Store:
    """A folder of vectors, opened for reading; `append` and `publish` add to it. See the package's text for the format."""

    def __init__(
        self,
        path: Path,
        fingerprint: dict[str, Any],
        width: int,
        records: Sequence[Shard],
        codec: Codec | None = None,
    ):
        self.path, self.fingerprint, self.width = path, fingerprint, width
        self.codec = codec or Codec(width)
        self._codec_file: CodecFile | None = None
        self.equal_configs: tuple[str, ...] = ()
        self.shards: list[Shard] = []
        self._vectors: list[np.ndarray] = []
        self.keys = np.zeros((0, 2), np.uint64)
        self.token_counts = np.zeros(0, np.int32)
        self.flags = np.zeros(0, np.uint8)
        self._starts = np.zeros(1, np.int64)
        self._index: tuple[np.ndarray, np.ndarray] | None = None
        self._attach(records)

    @classmethod
    def open(cls, path: str | Path, fingerprint: dict[str, Any] | None = None) -> "Store":
        """Open a store for reading; no lock, no writing. IntegrityError names every field of the fingerprint that differs.

        Shards are checked for presence and size here, for content by `verify`.
        """
        path = Path(path)
        manifest = shards.read_manifest(path)
        if fingerprint is not None:
            refuse_other_fingerprint(path, manifest.fingerprint, fingerprint, manifest.equal_configs)
        codec = shards.read_codec(path, manifest)
        opened = cls(path, manifest.fingerprint, manifest.width, manifest.shards, codec)
        opened._codec_file, opened.equal_configs = manifest.codec, manifest.equal_configs
        return opened

    @classmethod
    def open_or_create(
        cls, path: str | Path, fingerprint: dict[str, Any], width: int, *, codec: Codec | None = None
    ) -> "Store":
        """Open a store that is to be complete for this encoder; make it if there is none. Shards that are gone are taken out.

        `codec` is that of a store which is made now; one that stands keeps its own.
        """
        path = Path(path)
        if not (path / MANIFEST).exists():
            _create(cls(path, fingerprint, width, [], codec))
        manifest = shards.read_manifest(path)
        gone = [shard.file for shard in manifest.shards if not (path / shard.file).exists()]
        if gone:
            refuse_other_fingerprint(path, manifest.fingerprint, fingerprint, manifest.equal_configs)
            print(f"{path}: {', '.join(gone)} missing; their rows are computed anew", file=sys.stderr)
            forget(path, gone)
        return cls.open(path, fingerprint)

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def identity(self) -> str:
        """Digest of what its vectors depend on: the fingerprint and the codec."""
        parts = [self.fingerprint, str(self.codec.format), self._codec_file and self._codec_file.sha256]
        return files.digest(json.dumps(parts, sort_keys=True).encode())

    @property
    def digest(self) -> str:
        """Twelve digits for a run on its vectors: of `identity` if they are compressed, else of the fingerprint alone."""
        fingerprint = files.digest(json.dumps(self.fingerprint, sort_keys=True).encode())
        return (self.identity if self.codec.format.compressed else fingerprint)[:12]

    @property
    def distortion(self) -> Distortion | None:
        """What compression cost, over all shards, as it was measured when they were written; None for plain float16."""
        return Distortion.over([shard.distortion for shard in self.shards if shard.distortion])

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Row number of each key (n, 2), -1 where it is not stored. Cost: O(n log rows)."""
        if not len(self):
            return np.full(len(keys), -1)
        if self._index is None:
            everything = packed(self.keys)
            order = np.argsort(everything, kind="stable")
            self._index = order, everything[order]
        order, ordered = self._index
        wanted = packed(keys)
        place = np.searchsorted(ordered, wanted).clip(max=len(self) - 1)
        return np.where(ordered[place] == wanted, order[place], -1)

    def take(self, rows: np.ndarray, device: torch.device | None = None) -> Float[Tensor, "n e"]:
        """Vectors of row numbers, float32, in that order, read through the memory map (sorted inside a shard).

        Of full width however they are stored. A row whose flag is NOT_FINITE has NaN, one that is ZERO zeros. On `device`
        (None: the CPU); float16 rows go there as they are stored, in half the bytes.
        """
        return self.take_stored(rows).to(device).float()  # by torch: numpy takes ten times as long to widen float16

    def take_stored(self, rows: np.ndarray) -> Float[Tensor, "n e"]:
        """The same on the CPU, as float16 where that is how they are stored; rows of a compressed store are float32."""
        rows = np.asarray(rows)
        if len(rows) and not np.issubdtype(rows.dtype, np.integer):
            raise TypeError(
                f"rows are their numbers, integers, got {rows.dtype}; numpy.flatnonzero makes them of a mask."
            )
        rows = rows.astype(np.int64)
        if len(rows) and (rows.min() < 0 or rows.max() >= len(self)):
            raise IndexError(
                f"rows are 0..{len(self) - 1}, got {rows.min()}..{rows.max()}; -1 stands for a text that is not stored"
            )
        rising = np.empty((len(rows), self.codec.columns), self.codec.format.dtype)
        order = np.argsort(rows, kind="stable")
        numbers, place = rows[order], np.empty_like(order)
        place[order] = np.arange(len(order))
        bounds = np.searchsorted(numbers, self._starts)
        for shard, start, stop, first in zip(self._vectors, bounds[:-1], bounds[1:], self._starts, strict=False):
            # "clip" writes into `out` itself; "raise" makes a copy first
            np.take(shard, numbers[start:stop] - first, axis=0, out=rising[start:stop], mode="clip")
        stored = torch.from_numpy(rising).index_select(0, torch.from_numpy(place))
        if not self.codec.format.compressed:
            return stored
        out = self.codec.decode(stored.float().numpy())
        flags = self.flags[rows]
        out[flags == NOT_FINITE], out[flags == ZERO] = np.nan, 0.0
        return torch.from_numpy(out)

    def vectors(self, texts: Sequence[str], *, prompt: str = "") -> Float[Tensor, "n e"]:
        """Vectors of texts, float32. A text that is not stored raises IntegrityError with its number."""
        rows = self.find(text_keys(texts, prompt=prompt))
        if (rows < 0).any():
            first = int(np.argmax(rows < 0))
            raise IntegrityError(
                f"{self.path} holds no vector for {int((rows < 0).sum())} of {len(texts)} texts, the first is row {first}: "
                f"{texts[first][:80]!r}. Run embed() on them with the same prompt ({prompt!r})."
            )
        return self.take(rows)

    def fit(self, form: Format, rows: np.ndarray | None = None) -> Codec:
        """The codec of a format for these rows (None: all), fitted to at most 16,384 of them that are good, evenly spaced."""
        rows = np.arange(len(self)) if rows is None else rows
        good = rows[self.flags[rows] == GOOD]
        return compression.fit(form, self.take(good[compression.spread(len(good), compression.FIT_ROWS)]).numpy())

    def blocks(self, rows: int = SHARD_ROWS) -> Iterator[Rows]:
        """Everything, `rows` rows at a time, in the order of row numbers."""
        for start in range(0, len(self), rows):
            here = np.arange(start, min(start + rows, len(self)))
            yield Rows(self.take(here).numpy(), self.keys[here], self.token_counts[here], self.flags[here])

    def append(self, rows: Rows) -> list[Shard]:
        """Write rows into new shard files and return their records. They count only once `publish` has named them."""
        return [
            self._write(Rows(*(part[start : start + SHARD_ROWS] for part in vars(rows).values())))
            for start in range(0, len(rows.keys), SHARD_ROWS)
        ]

    def publish(self, records: Sequence[Shard]) -> None:
        """Add written shards to the manifest. One process at a time: hold `lock()`."""
        self._codec_file = self._codec_file or shards.write_codec(self.path, self.codec)
        everything = [*self.shards, *records]
        form, codec = self.codec.format, self._codec_file
        manifest = Manifest(self.fingerprint, self.width, everything, form, codec, self.equal_configs)
        shards.write_manifest(self.path, manifest)
        self._attach(records)

    def lock(self, *, timeout_seconds: float = -1) -> FileLock:
        """The writers' lock of this store; readers need none."""
        return FileLock(self.path / ".lock", timeout=timeout_seconds)

    def orphans(self) -> list[str]:
        """Files that no manifest names: a killed writer left them."""
        known = {shard.file for shard in self.shards} | ({self._codec_file.file} if self._codec_file else set())
        found = [*self.path.glob("rows-*.safetensors"), *self.path.glob("codec-*.safetensors")]
        return sorted(item.name for item in found if item.name not in known)

    def remove_orphans(self) -> list[str]:
        """Delete what a killed writer left behind, and return the names of its files. Hold `lock()`."""
        orphans = self.orphans()
        for name in orphans:
            (self.path / name).unlink(missing_ok=True)
        for item in self.unfinished():
            shutil.rmtree(item) if item.is_dir() else item.unlink(missing_ok=True)
        return orphans

    def unfinished(self) -> list[Path]:
        """What a writer writes, or has left when it was killed. safetensors writes to a .tmp file of its own first."""
        names = ("rows-*", "codec-*", "neighbours-*", MANIFEST, JOB, SAMPLE)
        return [
            item for pattern in (*(f".{name}.*" for name in names), ".tmp??????") for item in self.path.glob(pattern)
        ]

    @property
    def row_bytes(self) -> int:
        """Of the vector, and of key, token count and flag, which are 21."""
        return self.codec.format.row_bytes(self.width) + 21

    def require_space(self, rows: int) -> None:
        """ResourceError with needed and free bytes, before anything is written."""
        needed, free = rows * self.row_bytes * 11 // 10, shutil.disk_usage(self.path).free
        if needed > free:
            raise ResourceError(
                f"{rows:,} vectors of width {self.width} need {needed:,} bytes under {self.path}; {free:,} are free."
            )

    def _write(self, rows: Rows) -> Shard:
        self.path.mkdir(parents=True, exist_ok=True)
        columns = self.codec.encode(rows.vectors)
        tensors = {
            "vectors": columns,
            "keys": np.ascontiguousarray(rows.keys),
            "token_counts": rows.token_counts.astype(np.int32),
            "flags": rows.flags.astype(np.uint8),
        }
        name = f"rows-{hashlib.sha256(tensors['keys'].tobytes()).hexdigest()[:24]}.safetensors"
        try:
            with files.published_file(self.path / name) as temporary:
                save_file(tensors, temporary)
                size, digest = temporary.stat().st_size, files.sha256(temporary)
        except OSError as error:
            raise ResourceError(
                f"{len(rows.keys):,} rows cannot be written under {self.path}: {error}. What is stored is untouched; run again to go on."
            ) from error
        return Shard(name, len(rows.keys), size, digest, self._distortion(rows, columns))

    def _distortion(self, rows: Rows, columns: np.ndarray) -> Distortion | None:
        if not self.codec.format.compressed:
            return None
        good = rows.flags == GOOD
        return compression.measure(rows.vectors[good], columns[good], self.codec)

    def _attach(self, records: Sequence[Shard]) -> None:
        columns: dict[str, list[np.ndarray]] = {
            name: [getattr(self, name)] for name in ("keys", "token_counts", "flags")
        }
        for shard in records:
            small, vectors = shards.map_shard(self.path / shard.file, shard, self.codec.columns, self.codec.format)
            for name, column in small.items():
                columns[name].append(column)
            self._vectors.append(vectors)
            self.shards.append(shard)
        for name, parts in columns.items():
            setattr(self, name, np.concatenate(parts))
        self._starts = np.cumsum([0, *(shard.rows for shard in self.shards)])
        self._index = None


def _create(store: Store) -> None:
    """An empty manifest, by one of the processes that may want the same store at this moment."""
    inside = store.path.iterdir() if store.path.is_dir() else []
    others = [item.name for item in inside if item.name[0] != "." and not item.match("codec-*.safetensors")]
    if others and not (store.path / MANIFEST).exists():
        raise RecipeError(
            f"{store.path} is a folder with other things in it ({', '.join(sorted(others)[:3])}) and no {MANIFEST}. "
            "Name a new folder for the store, or bring its manifest back if it was one."
        )
    store.path.mkdir(parents=True, exist_ok=True)
    with store.lock():
        if not (store.path / MANIFEST).exists():
            store.publish([])


def differing_fields(stored: dict[str, Any], wanted: dict[str, Any], equal_configs: Sequence[str] = ()) -> list[str]:
    """Names of the fields of two fingerprints that differ; `config` does not where it is one of `equal_configs`."""
    fields = [name for name in sorted({*stored, *wanted}) if stored.get(name) != wanted.get(name)]
    return [name for name in fields if name != "config" or wanted.get(name) not in equal_configs]


def refuse_other_fingerprint(
    path: Path, stored: dict[str, Any], wanted: dict[str, Any], equal_configs: Sequence[str] = ()
) -> None:
    fields = differing_fields(stored, wanted, equal_configs)
    if fields:
        lines = "".join(
            f"\n  {name}: store {_short(stored.get(name))}, this encoder {_short(wanted.get(name))}" for name in fields
        )
        way = "Name another folder with --store, or load the encoder that made it."
        if fields == ["max_length"]:
            way = f"The same model with another limit: use --teacher.max-length {stored.get('max_length')}, or another folder with --store."
        if fields == ["config"]:
            way = (
                "Weights and tokenizer are the same. Where its vectors are, too, embed() finds out by computing some of the texts "
                f"that are stored again: here none is stored, or they differ. {way}"
            )
        raise IntegrityError(f"{path} holds the vectors of another encoder. What differs:{lines}\n{way}")


def _short(value: Any) -> str:
    text = str(value)
    return text[:12] if re.fullmatch(r"[0-9a-f]{40,}", text) else text
