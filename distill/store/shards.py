"""The files of a store: what a manifest, a codec and a shard must look like, and how a shard is mapped without reading its vectors."""

import hashlib
import json
import math
import re
import struct
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from distill import files
from distill.errors import IntegrityError, RecipeError, ResourceError
from distill.store.compression import Codec, Distortion, Format

MANIFEST = "manifest.json"
JOB = "job.safetensors"  # keys of the texts an unfinished embed() is about
SAMPLE = ".sample"  # the store of the texts that a codec is fitted to, until the store itself is made
SHARD_ROWS = 65_536
_HEADER_LIMIT = 1 << 20


@dataclass(frozen=True)
class Shard:
    """A shard as the manifest records it: file name, rows, size in bytes, sha256 of the file, what compression cost (None for float16)."""

    file: str
    rows: int
    bytes: int
    sha256: str
    distortion: Distortion | None = None


@dataclass(frozen=True)
class CodecFile:
    """The file that turns columns into vectors again: its name, size in bytes, sha256."""

    file: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What manifest.json says. Version 1 is plain float16; version 2 has a codec, and the distortion of each shard."""

    fingerprint: dict[str, Any]
    width: int
    shards: list[Shard]
    format: Format = field(default_factory=Format)
    codec: CodecFile | None = None
    equal_configs: tuple[str, ...] = ()  # other hashes of `config` whose vectors were found to be the same


def read_manifest(path: Path) -> Manifest:
    file = path / MANIFEST
    if not file.exists():
        raise IntegrityError(f"{path} is not a store: it has no {MANIFEST}. embed() makes one.")
    try:
        return _manifest(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise IntegrityError(
            f"{file} is damaged: {_reason(error)}. The shards beside it are untouched; restore the manifest from a copy. "
            "embed() deletes shards that the manifest does not name: if the copy may be older than they are, copy the folder first."
        ) from error
    except OSError as error:
        raise ResourceError(f"{file} cannot be read: {error.strerror}.") from error


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Whole or not at all. A store of float16 is written as version 1, as the first release did."""
    records = [{name: value for name, value in asdict(shard).items() if value is not None} for shard in manifest.shards]
    value = {
        "format": "distill-store",
        "version": 1 if manifest.codec is None else 2,
        "fingerprint": manifest.fingerprint,
        "width": manifest.width,
        "dtype": str(manifest.format),
        **({} if manifest.codec is None else {"codec": asdict(manifest.codec)}),
        **({"equal_configs": list(manifest.equal_configs)} if manifest.equal_configs else {}),
        "shards": records,
    }
    try:
        files.write_json(path / MANIFEST, value)
    except OSError as error:
        raise ResourceError(f"{path / MANIFEST} cannot be written: {error}. The one before is untouched.") from error


def forget(path: Path, names: Iterable[str]) -> None:
    """Take shards out of a store's manifest, then delete their files. embed() computes their rows anew. Takes the lock."""
    names = list(names)
    with FileLock(path / ".lock"):
        manifest = read_manifest(path)
        write_manifest(path, replace(manifest, shards=[shard for shard in manifest.shards if shard.file not in names]))
        for name in names:
            (path / name).unlink(missing_ok=True)


def verify(path: str | Path) -> dict[str, str]:
    """Check every file of a store against its manifest: {file: what is wrong}, empty when all is well. Cost: reads it once.

    ResourceError, or another OSError, for a file that cannot be read now: nobody knows whether it is damaged.
    """
    path = Path(path)
    manifest = read_manifest(path)
    damaged: dict[str, str] = {}
    if manifest.codec:
        try:
            read_codec(path, manifest)
        except IntegrityError as error:
            damaged[manifest.codec.file] = str(error)
    for shard in manifest.shards:
        try:
            map_shard(path / shard.file, shard, manifest.format.columns(manifest.width), manifest.format)
            if files.sha256(path / shard.file) != shard.sha256:
                damaged[shard.file] = "content differs from its sha256"
        except IntegrityError as error:
            damaged[shard.file] = str(error)
    return damaged


def write_codec(path: Path, codec: Codec) -> CodecFile | None:
    """Write what a codec needs into a file that is named by its content; None for float16, which needs nothing."""
    arrays = codec.arrays()
    if not arrays:
        return None
    content = hashlib.sha256(b"".join(name.encode() + array.tobytes() for name, array in arrays.items())).hexdigest()
    file = path / f"codec-{content[:24]}.safetensors"
    try:
        with files.published_file(file) as temporary:
            save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, temporary)
            return CodecFile(file.name, temporary.stat().st_size, files.sha256(temporary))
    except OSError as error:
        raise ResourceError(f"{file} cannot be written: {error}.") from error


def read_codec(path: Path, manifest: Manifest) -> Codec:
    """The codec of a store, its file checked by sha256. IntegrityError if it is not what was written."""
    if manifest.codec is None:
        return Codec(manifest.width)
    file = path / manifest.codec.file
    try:
        if files.sha256(file) != manifest.codec.sha256:
            raise ValueError("its content differs from its sha256")
        arrays = {name: array.copy() for name, array in load_file(file).items()}
        _check_codec(arrays, manifest)
    except (OSError, ValueError, SafetensorError) as error:
        raise IntegrityError(
            f"{file} is missing or damaged: {error}. No vector of {path} can be read without it: copy it again, or delete "
            "the store and embed anew."
        ) from error
    return Codec(manifest.width, manifest.format, **arrays)


def map_shard(path: Path, shard: Shard, columns: int, form: Format) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The small columns in memory and the vectors (rows, columns) as a memory map."""
    if not path.exists():
        raise IntegrityError(f"{path} is missing. Run embed() again: only its {shard.rows:,} rows are computed anew.")
    try:
        found = path.stat().st_size
        if found != shard.bytes:
            raise ValueError(f"it has {found:,} bytes, the manifest says {shard.bytes:,}")
        header, data = _read_header(path)
        vectors_start = data + _start(header, form.dtype, "vectors", [shard.rows, columns], found - data)
        shapes = {"keys": [shard.rows, 2], "token_counts": [shard.rows], "flags": [shard.rows]}
        starts = {name: data + _start(header, name, name, shape, found - data) for name, shape in shapes.items()}
        small = {name: _read_column(path, starts[name], name, shape) for name, shape in shapes.items()}
        vectors = _mapped(path, _COLUMNS[form.dtype][1], vectors_start, (shard.rows, columns))
    except (ValueError, KeyError, TypeError, RecursionError, struct.error) as error:
        raise IntegrityError(
            f"{path} is damaged: {_reason(error)}. Copy it again, or run `python -m distill.store repair {path.parent}` "
            f"and embed() again: only its {shard.rows:,} rows are computed anew."
        ) from error
    except (OSError, RuntimeError) as error:  # of the system, of torch
        raise ResourceError(f"{path} cannot be read: {error}. Nothing of it is lost by that.") from error
    return small, vectors


def _mapped(path: Path, dtype: np.dtype[Any], offset: int, shape: tuple[int, int]) -> np.ndarray:
    """A part of a file, read where it is used. No file stays open, as one would for numpy's memmap: shards may be more than those a process may have."""
    content = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8).numpy()
    part = content[offset : offset + math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)
    part.flags.writeable = False
    return part


def _manifest(value: Any) -> Manifest:
    """The manifest of a JSON value; ValueError, KeyError or TypeError for what is none."""
    if not isinstance(value, dict) or value.get("format") != "distill-store":
        raise ValueError("it is not a distill-store manifest")
    form = _format(value.get("version"), value.get("dtype"))
    if not isinstance(value["fingerprint"], dict):
        raise ValueError("the fingerprint is not an object")
    if type(value["width"]) is not int or not 0 < value["width"] <= 1 << 20:
        raise ValueError(f"width {value['width']!r}")
    form.columns(value["width"])
    records = [_shard(record, form) for record in value["shards"]]
    if len({shard.file for shard in records}) < len(records):
        raise ValueError("a shard is recorded as two of one name")
    codec = _codec_file(value["codec"]) if form.compressed else None
    equal = value.get("equal_configs", [])
    if not isinstance(equal, list) or not all(type(one) is str and re.fullmatch(r"[0-9a-f]{64}", one) for one in equal):
        raise ValueError(f"equal_configs {equal!r:.60}")
    return Manifest(value["fingerprint"], value["width"], records, form, codec, tuple(equal))


def _format(version: Any, dtype: Any) -> Format:
    try:
        form = Format.parse(dtype) if type(version) is int and type(dtype) is str else None
    except RecipeError:
        form = None
    if form is None or version != (2 if form.compressed else 1):
        raise ValueError(
            f"version {version!r} with dtype {dtype!r}; this release reads version 1, float16, and version 2, "
            "int8, pca-K and pca-K-int8"
        )
    return form


def _shard(record: Any, form: Format) -> Shard:
    given = dict(record)
    lost = given.pop("distortion", None)
    shard = Shard(**given)
    if type(shard.rows) is not int or not 0 < shard.rows <= SHARD_ROWS or not _is_file("rows", given):
        raise ValueError(f"a shard is recorded as {record!r}")
    return replace(shard, distortion=_distortion(lost, shard.rows)) if form.compressed or lost else shard


def _codec_file(record: Any) -> CodecFile:
    codec = CodecFile(**record)
    if not _is_file("codec", record):
        raise ValueError(f"the codec is recorded as {record!r}")
    return codec


def _is_file(kind: str, record: dict[str, Any]) -> bool:
    """Whether file, bytes and sha256 of a record can be those of a file of the store."""
    file, size, sha256 = record["file"], record["bytes"], record["sha256"]
    named = re.fullmatch(kind + r"-[0-9a-f]{24}\.safetensors", str(file)) and type(size) is int and size > 0
    if type(sha256) is not str or not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise ValueError(f"sha256 {sha256!r}")
    return bool(named) and type(file) is str


def _distortion(record: Any, rows: int) -> Distortion:
    value = Distortion(**record)
    numbers = (value.mean, value.worst, value.pairs)
    if type(value.rows) is not int or not 0 <= value.rows <= rows:
        raise ValueError(f"distortion of {value.rows!r} rows")
    if not all(type(number) in (int, float) and 0 <= number <= 2.001 for number in numbers):
        raise ValueError(f"distortion {record!r}")
    return value


def _check_codec(arrays: dict[str, np.ndarray], manifest: Manifest) -> None:
    columns = manifest.format.columns(manifest.width)
    expected: dict[str, tuple[int, ...]] = {"rotation": (columns, manifest.width)} if manifest.format.components else {}
    if manifest.format.dtype == "int8":
        expected |= {"centre": (columns,), "scale": (columns,)}
    found = {name: array.shape for name, array in arrays.items()}
    if found != expected or any(array.dtype != np.float32 for array in arrays.values()):
        raise ValueError(f"it holds {found}, expected {expected} in float32")


_COLUMNS: dict[str, tuple[str, np.dtype[Any]]] = {
    "float16": ("F16", np.dtype("<f2")),
    "int8": ("I8", np.dtype("i1")),
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


def _start(header: dict[str, Any], column: str, name: str, shape: list[int], available: int) -> int:
    """Where the column begins behind the header, once its type, shape and place are what they must be."""
    entry, (kind, dtype) = header[name], _COLUMNS[column]
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
