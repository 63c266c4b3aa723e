"""A run's folder belongs to one run at a time: its lock, which the main process holds. A kill lets go of it."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from filelock import FileLock, Timeout

from distill import distributed
from distill.errors import RecipeError, ResourceError, explained

NAME = ".lock"
WAIT_SECONDS = 10.0  # for a process that is about to end, killed by a launcher say

_held: dict[Path, FileLock] = {}  # by this process, which may take each once more


def take(output: Path) -> None:
    """Take the folder's lock until this process ends: the main process of a run. RecipeError if another run has it."""
    lock = _held.setdefault(output.resolve(), FileLock(output / NAME, thread_local=False))
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=WAIT_SECONDS)
    except Timeout as error:
        raise RecipeError(
            f"another run is writing {output} (it holds {output / NAME}). Wait for it or stop it, or name another --output."
        ) from error
    except OSError as error:
        raise ResourceError(
            f"{output} cannot be written: {explained(error)} Name a folder you may write to with --output."
        ) from error


@contextmanager
def held(output: Path) -> Iterator[None]:
    """The folder's lock for a block, which all processes enter. RecipeError in all if another run has it."""
    distributed.main_first(partial(take, output))
    try:
        yield
    finally:
        if distributed.is_main():
            _held[output.resolve()].release()
