"""The files of a store: what a manifest and a shard must look like, and how a shard is mapped without reading its vectors."""

import json
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distill.errors import IntegrityError

MANIFEST = "manifest.json"
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
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(
            f"{file} is damaged: {error}. The shards beside it are untouched; restore the manifest from a copy."
        ) from error
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
        if not re.fullmatch(r"[0-9a-f]{64}", str(shard.sha256)):
            raise ValueError(f"sha256 {shard.sha256!r}")
        names.add(shard.file)


def map_shard(path: Path, shard: Shard, width: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The small columns in memory and the vectors (rows, width) as a memory map."""
    if not path.exists():
        raise IntegrityError(f"{path} is missing. Run embed() again: only its {shard.rows:,} rows are computed anew.")
    if path.stat().st_size != shard.bytes:
        raise IntegrityError(
            f"{path} has {path.stat().st_size:,} bytes, its manifest says {shard.bytes:,}. Copy it again, or delete the store."
        )
    try:
        header, data = _read_header(path)
        expected = {
            "vectors": ("F16", [shard.rows, width]),
            "keys": ("U64", [shard.rows, 2]),
            "token_counts": ("I32", [shard.rows]),
            "flags": ("U8", [shard.rows]),
        }
        for name, (dtype, shape) in expected.items():
            if (header[name]["dtype"], header[name]["shape"]) != (dtype, shape):
                raise ValueError(f"{name} is {header[name]['dtype']} {header[name]['shape']}, expected {dtype} {shape}")
        small = {name: _read_column(path, data, header[name]) for name in ("keys", "token_counts", "flags")}
        start, stop = header["vectors"]["data_offsets"]
        if stop - start != 2 * shard.rows * width or not 0 <= start <= stop <= shard.bytes - data:
            raise ValueError("the vectors lie outside the file")
    except (ValueError, KeyError, TypeError, struct.error) as error:
        raise IntegrityError(
            f"{path} is damaged: {error}. `python -m distill.store verify {path.parent}` lists all damaged shards."
        ) from error
    return small, np.memmap(path, np.float16, "r", offset=data + start, shape=(shard.rows, width))


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        if size > min(_HEADER_LIMIT, path.stat().st_size):
            raise ValueError(f"its header claims {size:,} bytes")
        return json.loads(file.read(size)), 8 + size


def _read_column(path: Path, data: int, entry: dict[str, Any]) -> np.ndarray:
    dtype = np.dtype({"U64": "<u8", "I32": "<i4", "U8": "u1"}[entry["dtype"]])
    count = int(np.prod(entry["shape"]))
    start, stop = entry["data_offsets"]
    if start < 0 or stop - start != count * dtype.itemsize:
        raise ValueError("a column's offsets do not fit its shape")
    column = np.fromfile(path, dtype, count, offset=data + start)
    if len(column) != count:
        raise ValueError("a column ends early")
    return column.reshape(entry["shape"])
