"""A forked process in which one call to the file system fails, or is its last: as if the disk were full, or the power went.

What Python calls is counted and disturbed at `os`: open, fsync, rename, replace, unlink, mkdir, rmdir, chmod, files opened
for writing, and the exchange of two folders. What libraries write by themselves (safetensors) is cut by the limit of a
file's size instead, at any byte.
"""

import io
import json
import os
import resource
import signal
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill import files
from distill.errors import DistillError

CALLS = ("open", "fsync", "rename", "replace", "unlink", "mkdir", "rmdir", "chmod")
# At the n-th call: it fails; it and all later ones fail; SIGKILL; SIGKILL, and what was never synced is cut.
AT_A_CALL = ("fails", "stays broken", "kill", "power")
# At the n-th byte of a file: writing fails; the process dies.
AT_A_BYTE = ("full", "killed writing")


@dataclass(frozen=True)
class Outcome:
    """How a disturbed process ended: done, a documented error, killed, or something that should not be; calls it made."""

    how: str
    calls: int
    text: str = ""


def disturbed(act: Callable[[], Any], root: Path, mode: str = "", at: int = 0) -> Outcome:
    """Run `act` in a forked process that is disturbed at its n-th call or byte; undisturbed without a mode."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _live(act, root, mode, at, writing)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        wanted = os.WTERMSIG(status) in (signal.SIGKILL, signal.SIGXFSZ)
        return Outcome("killed" if wanted else f"signal {os.WTERMSIG(status)}", at)
    return Outcome(**json.loads(said))


def _live(act: Callable[[], Any], root: Path, mode: str, at: int, pipe: int) -> None:
    """The child's whole life; never returns."""
    how, text, shim = "undocumented", "", _Shim(root, mode, at)
    try:
        shim.arm()
        act()
        how = "done"
    except (DistillError, OSError) as error:
        how, text = "error", f"{type(error).__name__}: {error}"
    except BaseException:
        text = traceback.format_exc()
    finally:
        shim.disarm()
        os.write(pipe, json.dumps({"how": how, "calls": shim.calls, "text": text}).encode())
        os._exit(0)


class _Shim:
    def __init__(self, root: Path, mode: str, at: int):
        self.root, self.mode, self.at = root, mode, at
        self.calls = 0
        self.on = False
        self.synced: dict[int, int] = {}
        self.originals = {name: getattr(os, name) for name in CALLS}

    def arm(self) -> None:
        self.synced = {item.stat().st_ino: item.stat().st_size for item in self.root.rglob("*") if item.is_file()}
        if self.mode in AT_A_BYTE:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN if self.mode == "full" else signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.at, resource.RLIM_INFINITY))
        for name, original in self.originals.items():
            setattr(os, name, self._counted(name, original))
        io.open = self._counted_open(io.open)  # type: ignore[assignment]
        files.exchange = self._counted("exchange", files.exchange)
        self.on = True

    def disarm(self) -> None:
        self.on = False

    def _counted(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            self._count(name)
            result = original(*arguments, **options)
            if name == "fsync" and self.on:
                found = os.fstat(arguments[0])
                self.synced[found.st_ino] = found.st_size
            return result

        return call

    def _counted_open(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            if set(mode) & set("wax+"):
                self._count("open")
            return original(file, mode, *arguments, **options)

        return call

    def _count(self, name: str) -> None:
        if not self.on:
            return
        self.calls += 1
        if self.mode == "fails" and self.calls == self.at:
            raise OSError(28, f"No space left on device ({name})")
        if self.mode == "stays broken" and self.calls >= self.at:
            raise OSError(30, f"Read-only file system ({name})")
        if self.mode in ("kill", "power") and self.calls == self.at:
            self.on = False
            if self.mode == "power":
                self._lose()
            os.kill(os.getpid(), signal.SIGKILL)

    def _lose(self) -> None:
        """What was written since it was last synced goes: half of a new file, the end of one that grew."""
        for item in self.root.rglob("*"):
            if item.is_file() and not item.is_symlink():
                found = item.stat()
                self.originals["chmod"](item, 0o600)
                os.truncate(item, min(found.st_size, self.synced.get(found.st_ino, found.st_size // 2)))
