"""The files of a store: what a manifest and a shard must look like, and how a shard is mapped without reading its vectors."""

import json
import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distill.errors import IntegrityError, ResourceError

MANIFEST = "manifest.json"
JOB = "job.safetensors"  # keys of the texts an unfinished embed() is about
SHARD_ROWS = 65_536
_HEADER_LIMIT = 1 << 20


@dataclass(frozen=True)
class Shard:
    """A shard as the manifest records it: file name, rows, size in bytes, sha256 of the file."""

    file: str
    rows: int
    bytes: int
    sha256: str


def read_manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    if not file.exists():
        raise IntegrityError(f"{path} is not a store: it has no {MANIFEST}. embed() makes one.")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        _check_manifest(manifest)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise IntegrityError(
            f"{file} is damaged: {_reason(error)}. The shards beside it are untouched; restore the manifest from a copy."
        ) from error
    except OSError as error:
        raise ResourceError(f"{file} cannot be read: {error.strerror}.") from error
    return manifest


def _check_manifest(manifest: Any) -> None:
    if not isinstance(manifest, dict) or manifest.get("format") != "distill-store":
        raise ValueError("it is not a distill-store manifest")
    if manifest.get("version") != 1 or manifest.get("dtype") != "float16":
        raise ValueError(
            f"version {manifest.get('version')!r} with dtype {manifest.get('dtype')!r}; this release reads version 1, float16"
        )
    if not isinstance(manifest["fingerprint"], dict):
        raise ValueError("the fingerprint is not an object")
    if type(manifest["width"]) is not int or not 0 < manifest["width"] <= 1 << 20:
        raise ValueError(f"width {manifest['width']!r}")
    names = set()
    for record in manifest["shards"]:
        shard = Shard(**record)
        fits = type(shard.rows) is int and 0 < shard.rows <= SHARD_ROWS and type(shard.bytes) is int and shard.bytes > 0
        if not fits or not re.fullmatch(r"rows-[0-9a-f]{24}\.safetensors", str(shard.file)) or shard.file in names:
            raise ValueError(f"a shard is recorded as {record!r}")
        if type(shard.sha256) is not str or not re.fullmatch(r"[0-9a-f]{64}", shard.sha256):
            raise ValueError(f"sha256 {shard.sha256!r}")
        names.add(shard.file)


def map_shard(path: Path, shard: Shard, width: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The small columns in memory and the vectors (rows, width) as a memory map."""
    if not path.exists():
        raise IntegrityError(f"{path} is missing. Run embed() again: only its {shard.rows:,} rows are computed anew.")
    try:
        found = path.stat().st_size
        if found != shard.bytes:
            raise ValueError(f"it has {found:,} bytes, the manifest says {shard.bytes:,}")
        header, data = _read_header(path)
        shapes = {"keys": [shard.rows, 2], "token_counts": [shard.rows], "flags": [shard.rows]}
        starts = {
            name: data + _start(header[name], name, shape, found - data)
            for name, shape in {"vectors": [shard.rows, width], **shapes}.items()
        }
        small = {name: _read_column(path, starts[name], name, shape) for name, shape in shapes.items()}
        vectors = np.memmap(path, np.float16, "r", offset=starts["vectors"], shape=(shard.rows, width))
    except (ValueError, KeyError, TypeError, RecursionError, struct.error, OSError) as error:
        raise IntegrityError(
            f"{path} is damaged: {_reason(error)}. Copy it again, or run `python -m distill.store repair {path.parent}` "
            f"and embed() again: only its {shard.rows:,} rows are computed anew."
        ) from error
    return small, vectors


_COLUMNS: dict[str, tuple[str, np.dtype[Any]]] = {
    "vectors": ("F16", np.dtype("<f2")),
    "keys": ("U64", np.dtype("<u8")),
    "token_counts": ("I32", np.dtype("<i4")),
    "flags": ("U8", np.dtype("u1")),
}


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        if size > min(_HEADER_LIMIT, path.stat().st_size - 8):
            raise ValueError(f"its header claims {size:,} bytes")
        return json.loads(file.read(size).decode("utf-8")), 8 + size


def _start(entry: dict[str, Any], name: str, shape: list[int], available: int) -> int:
    """Where a column begins behind the header, once its type, shape and place are what they must be."""
    kind, dtype = _COLUMNS[name]
    if (entry["dtype"], entry["shape"]) != (kind, shape):
        raise ValueError(f"{name} is {entry['dtype']} {entry['shape']}, expected {kind} {shape}")
    start, stop = entry["data_offsets"]
    if (
        type(start) is not int
        or stop - start != math.prod(shape) * dtype.itemsize
        or not 0 <= start <= stop <= available
    ):
        raise ValueError(f"{name} lies at {start}..{stop} of {available:,} bytes, which does not fit its shape")
    return start


def _read_column(path: Path, offset: int, name: str, shape: list[int]) -> np.ndarray:
    column = np.fromfile(path, _COLUMNS[name][1], math.prod(shape), offset=offset)
    return column.reshape(shape)


def _reason(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"it has no {error}"
    return "it is nested too deep" if isinstance(error, RecursionError) else str(error)
