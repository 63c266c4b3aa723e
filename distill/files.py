"""Files that appear whole or not at all: write beside, flush to the disk, rename."""

import ctypes
import glob
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

# What tempfile puts behind a prefix, as a pattern.
_RANDOM = "[a-z0-9_]" * 8


@contextmanager
def published_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder; on success it is synced and renamed to `path`, on failure removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        with _told_as_os_error():
            yield temporary
        _publish_mode(temporary)
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def published_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success every file in it is synced and the folder takes `path`'s place.

    An existing folder at `path` changes places with the new one and is removed then. Where the file system cannot exchange
    two folders it is moved aside first, and put back if that fails; after a kill in between, the next call puts it back.
    """
    path = path.resolve()  # of a link, what it points to
    path.parent.mkdir(parents=True, exist_ok=True)
    _put_back(path)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    aside = temporary.with_name(temporary.name + ".old")
    try:
        with _told_as_os_error():
            yield temporary
        for item in [*temporary.rglob("*"), temporary]:
            _publish_mode(item)
            sync(item)
        if not (path.is_dir() and exchange(temporary, path)):
            if path.exists():
                os.rename(path, aside)
            os.rename(temporary, path)
        sync(path.parent)
    finally:
        if aside.exists() and not path.exists():
            os.rename(aside, path)
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def _told_as_os_error() -> Iterator[None]:
    """A full disk is an OSError, whoever writes: safetensors says it in an error of its own."""
    try:
        yield
    except SafetensorError as error:
        found = re.search(r"os error (\d+)", str(error))
        raise (OSError(int(found[1]), os.strerror(int(found[1]))) if found else OSError(str(error))) from error


def exchange(one: Path, other: Path) -> bool:
    """Let two folders change places, at once. False where the system cannot do that, and nothing has changed."""
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if sys.platform == "darwin":
            return libc.renamex_np(os.fsencode(one), os.fsencode(other), 2) == 0  # RENAME_SWAP
        return libc.renameat2(-100, os.fsencode(one), -100, os.fsencode(other), 2) == 0  # AT_FDCWD, RENAME_EXCHANGE
    except (AttributeError, OSError, TypeError):  # a libc without it, or none
        return False


def recover(path: Path) -> None:
    """Mend what killed writers of a folder left: put back what was moved aside, delete what is unfinished. Nobody may be writing there."""
    path = path.resolve()
    _put_back(path)
    remove_unfinished(path.parent, glob.escape(path.name))


def _put_back(path: Path) -> None:
    """A folder that a killed `published_folder` had moved aside, if nothing has taken its place."""
    if not path.exists():
        for aside in sorted(path.parent.glob(f".{glob.escape(path.name)}.{_RANDOM}.old"))[:1]:
            os.rename(aside, path)


def remove_folder(path: Path) -> None:
    """Take a folder away at once, then delete it: a kill in between leaves no folder with half of its files."""
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    os.rename(path, aside)
    shutil.rmtree(aside)


def remove_unfinished(folder: Path, name: str) -> None:
    """Delete what killed writers of `name` (a pattern) left in a folder. Nobody may be writing there."""
    for item in [*folder.glob(f".{name}.{_RANDOM}"), *folder.glob(f".{name}.{_RANDOM}.old")]:
        shutil.rmtree(item) if item.is_dir() and not item.is_symlink() else item.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Strict UTF-8: half a surrogate pair, which a text may hold, is written as its JSON escape."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    with published_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def sha256(path: Path, progress: Callable[[int], object] | None = None) -> str:
    total = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            total.update(block)
            if progress:
                progress(len(block))
    return total.hexdigest()


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _publish_mode(path: Path) -> None:
    """What the umask leaves: temporary files are private, and so are those of safetensors."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def sync(path: Path) -> None:
    """See to it that what was written to a file, or which names a folder holds, outlives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
