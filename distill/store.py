"""Teacher vectors on disk: sharded, keyed, checked, memory-mapped. A teacher runs once per text in the life of a project.

A store is a folder: safetensors shards of at most 65,536 rows and a manifest.json, written last, that lists them with
their sha256. A row is a vector (fp16), the 128-bit key of (kind, prompt, exact text), a token count and a flag. Rows are
found by key, never by number. The fingerprint says which encoder made the vectors; another one is never read by accident.

    python -m distill.store info PATH          what is in it
    python -m distill.store verify PATH        whether every shard is what was written
    python -m distill.store repair PATH        take damaged shards out; embed() computes only their rows anew
"""

import argparse
import hashlib
import re
import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.numpy import save_file
from torch import Tensor

from distill import files, shards
from distill.errors import DistillError, IntegrityError, RecipeError, ResourceError
from distill.shards import JOB, MANIFEST, SHARD_ROWS, Shard

GOOD, NOT_FINITE, ZERO, NO_TOKENS = 0, 1, 2, 3  # flags of a row; only GOOD rows are trained on
FLAG_NAMES = {NOT_FINITE: "not finite", ZERO: "zero vector", NO_TOKENS: "no tokens"}


@dataclass(frozen=True)
class Rows:
    """Rows to be written: vectors (n, e), keys (n, 2) uint64, token counts (n), flags (n)."""

    vectors: np.ndarray
    keys: np.ndarray
    token_counts: np.ndarray
    flags: np.ndarray


def text_keys(texts: Iterable[str], *, prompt: str = "", kind: str = "text") -> np.ndarray:
    """128-bit keys (n, 2) uint64 of (kind, prompt, exact text). The same text under two prompts has two keys."""
    head = f"{kind}\0{len(prompt)}\0{prompt}\0".encode("utf-8", "surrogatepass")
    digests = (hashlib.blake2b(head + text.encode("utf-8", "surrogatepass"), digest_size=16).digest() for text in texts)
    return np.frombuffer(b"".join(digests), dtype="<u8").reshape(-1, 2)


class Store:
    """A folder of vectors, opened for reading; `append` and `publish` add to it. See the module's text for the format."""

    def __init__(self, path: Path, fingerprint: dict[str, Any], width: int, records: Sequence[Shard]):
        self.path, self.fingerprint, self.width = path, fingerprint, width
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
            refuse_other_fingerprint(path, manifest["fingerprint"], fingerprint)
        return cls(path, manifest["fingerprint"], manifest["width"], [Shard(**shard) for shard in manifest["shards"]])

    @classmethod
    def open_or_create(cls, path: str | Path, fingerprint: dict[str, Any], width: int) -> "Store":
        """Open a store that is to be complete for this encoder; make it if there is none. Shards that are gone are taken out."""
        path = Path(path)
        if not (path / MANIFEST).exists():
            _create(cls(path, fingerprint, width, []))
        manifest = shards.read_manifest(path)
        gone = [shard["file"] for shard in manifest["shards"] if not (path / shard["file"]).exists()]
        if gone:
            refuse_other_fingerprint(path, manifest["fingerprint"], fingerprint)
            print(f"{path}: {', '.join(gone)} missing; their rows are computed anew", file=sys.stderr)
            forget(path, gone)
        return cls.open(path, fingerprint)

    def __len__(self) -> int:
        return len(self.keys)

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

    def take(self, rows: np.ndarray) -> Float[Tensor, "n e"]:
        """Vectors of row numbers, float32, in that order, read through the memory map (sorted inside a shard)."""
        rows = np.asarray(rows, dtype=np.int64)
        if len(rows) and (rows.min() < 0 or rows.max() >= len(self)):
            raise IndexError(
                f"rows are 0..{len(self) - 1}, got {rows.min()}..{rows.max()}; -1 stands for a text that is not stored"
            )
        out = np.empty((len(rows), self.width), np.float32)
        order = np.argsort(rows, kind="stable")
        bounds = np.searchsorted(rows[order], self._starts)
        for shard, start, stop, first in zip(self._vectors, bounds[:-1], bounds[1:], self._starts, strict=False):
            places = order[start:stop]
            out[places] = shard[rows[places] - first]
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

    def append(self, rows: Rows) -> list[Shard]:
        """Write rows into new shard files and return their records. They count only once `publish` has named them."""
        return [
            self._write(Rows(*(part[start : start + SHARD_ROWS] for part in vars(rows).values())))
            for start in range(0, len(rows.keys), SHARD_ROWS)
        ]

    def publish(self, records: Sequence[Shard]) -> None:
        """Add written shards to the manifest. One process at a time: hold `lock()`."""
        _write_manifest(self.path, self.fingerprint, self.width, [*self.shards, *records])
        self._attach(records)

    def lock(self, *, timeout_seconds: float = -1) -> FileLock:
        """The writers' lock of this store; readers need none."""
        return FileLock(self.path / ".lock", timeout=timeout_seconds)

    def orphans(self) -> list[str]:
        """Shard files that no manifest names: a killed writer left them."""
        known = {shard.file for shard in self.shards}
        return sorted(item.name for item in self.path.glob("rows-*.safetensors") if item.name not in known)

    def remove_orphans(self) -> list[str]:
        """Delete what a killed writer left behind, and return the names of its shards. Hold `lock()`."""
        orphans = self.orphans()
        for name in orphans:
            (self.path / name).unlink(missing_ok=True)
        for name in ("rows-*", MANIFEST, JOB):
            files.remove_unfinished(self.path, name)
        return orphans

    def require_space(self, rows: int) -> None:
        """ResourceError with needed and free bytes, before anything is written."""
        needed, free = rows * (2 * self.width + 21) * 11 // 10, shutil.disk_usage(self.path).free
        if needed > free:
            raise ResourceError(
                f"{rows:,} vectors of width {self.width} need {needed:,} bytes under {self.path}; {free:,} are free."
            )

    def _write(self, rows: Rows) -> Shard:
        self.path.mkdir(parents=True, exist_ok=True)
        tensors = {
            "vectors": np.ascontiguousarray(rows.vectors, dtype=np.float16),
            "keys": np.ascontiguousarray(rows.keys),
            "token_counts": rows.token_counts.astype(np.int32),
            "flags": rows.flags.astype(np.uint8),
        }
        name = f"rows-{hashlib.sha256(tensors['keys'].tobytes()).hexdigest()[:24]}.safetensors"
        try:
            with files.published_file(self.path / name) as temporary:
                save_file(tensors, temporary)
                size, digest = temporary.stat().st_size, files.sha256(temporary)
        except (OSError, SafetensorError) as error:
            raise ResourceError(
                f"{len(rows.keys):,} rows cannot be written under {self.path}: {error}. What is stored is untouched; run again to go on."
            ) from error
        return Shard(name, len(rows.keys), size, digest)

    def _attach(self, records: Sequence[Shard]) -> None:
        columns: dict[str, list[np.ndarray]] = {
            name: [getattr(self, name)] for name in ("keys", "token_counts", "flags")
        }
        for shard in records:
            small, vectors = shards.map_shard(self.path / shard.file, shard, self.width)
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
    others = [item.name for item in store.path.iterdir() if item.name[0] != "."] if store.path.is_dir() else []
    if others and not (store.path / MANIFEST).exists():
        raise RecipeError(
            f"{store.path} is a folder with other things in it ({', '.join(sorted(others)[:3])}) and no {MANIFEST}. "
            "Name a new folder for the store, or bring its manifest back if it was one."
        )
    store.path.mkdir(parents=True, exist_ok=True)
    with store.lock():
        if not (store.path / MANIFEST).exists():
            store.publish([])


def _write_manifest(path: Path, fingerprint: dict[str, Any], width: int, records: Sequence[Shard]) -> None:
    manifest = {
        "format": "distill-store",
        "version": 1,
        "fingerprint": fingerprint,
        "width": width,
        "dtype": "float16",
        "shards": [asdict(shard) for shard in records],
    }
    try:
        files.write_json(path / MANIFEST, manifest)
    except OSError as error:
        raise ResourceError(f"{path / MANIFEST} cannot be written: {error}. The one before is untouched.") from error


def forget(path: Path, names: Iterable[str]) -> None:
    """Take shards out of a store's manifest, then delete their files. embed() computes their rows anew. Takes the lock."""
    with FileLock(path / ".lock"):
        manifest = shards.read_manifest(path)
        kept = [Shard(**shard) for shard in manifest["shards"] if shard["file"] not in set(names)]
        _write_manifest(path, manifest["fingerprint"], manifest["width"], kept)
        for name in names:
            (path / name).unlink(missing_ok=True)


def verify(path: str | Path) -> dict[str, str]:
    """Check every shard of a store against its manifest: {file: what is wrong}, empty when all is well. Cost: reads it once."""
    path = Path(path)
    manifest = shards.read_manifest(path)
    damaged: dict[str, str] = {}
    for record in manifest["shards"]:
        shard = Shard(**record)
        try:
            shards.map_shard(path / shard.file, shard, manifest["width"])
            if files.sha256(path / shard.file) != shard.sha256:
                damaged[shard.file] = "content differs from its sha256"
        except (IntegrityError, OSError) as error:
            damaged[shard.file] = str(error)
    return damaged


def refuse_other_fingerprint(path: Path, stored: dict[str, Any], wanted: dict[str, Any]) -> None:
    fields = [name for name in sorted({*stored, *wanted}) if stored.get(name) != wanted.get(name)]
    if fields:
        lines = "".join(
            f"\n  {name}: store {_short(stored.get(name))}, this encoder {_short(wanted.get(name))}" for name in fields
        )
        way = "Name another folder with --store, or load the encoder that made it."
        if fields == ["max_length"]:
            way = f"The same model with another limit: use --teacher.max-length {stored.get('max_length')}, or another folder with --store."
        raise IntegrityError(f"{path} holds the vectors of another encoder. What differs:{lines}\n{way}")


def packed(keys: np.ndarray) -> np.ndarray:
    """(n, 2) uint64 -> (n) byte strings of 16, which numpy sorts and compares whole."""
    return np.ascontiguousarray(keys).view("S16").reshape(-1)


def _short(value: Any) -> str:
    text = str(value)
    return text[:12] if re.fullmatch(r"[0-9a-f]{40,}", text) else text


def main(arguments: Sequence[str] | None = None) -> int:
    """python -m distill.store info|verify|repair PATH: what is in a store, whether it is whole, and to make it whole again."""
    parser = argparse.ArgumentParser(prog="python -m distill.store", description="Look at a store of teacher vectors.")
    parser.add_argument("command", choices=("info", "verify", "repair"))
    parser.add_argument("path", type=Path)
    options = parser.parse_args(arguments)
    commands = {"info": _print_info, "verify": _print_verify, "repair": _repair}
    try:
        return commands[options.command](options.path)
    except DistillError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return ResourceError.exit_code


def _print_verify(path: Path) -> int:
    damaged = verify(path)
    for file, problem in damaged.items():
        print(f"{file}: {problem}")
    count = len(shards.read_manifest(path)["shards"])
    print(f"{path}: {count - len(damaged)} of {count} shards are whole")
    return IntegrityError.exit_code if damaged else 0


def _repair(path: Path) -> int:
    damaged = verify(path)
    forget(path, damaged)
    print(f"{path}: {len(damaged)} damaged shards taken out. Run embed() again: only their rows are computed anew.")
    return 0


def _print_info(path: Path) -> int:
    store = Store.open(path)
    for name, value in store.fingerprint.items():
        print(f"{name}: {value}")
    flagged = {name: int((store.flags == flag).sum()) for flag, name in FLAG_NAMES.items()}
    print(
        f"rows: {len(store):,} of width {store.width}, {len(store.shards)} shards, {sum(s.bytes for s in store.shards):,} bytes"
    )
    print("set aside: " + (", ".join(f"{count} {name}" for name, count in flagged.items() if count) or "none"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
