"""What a run logs: metrics.jsonl, one line a step, and the trackers that were asked for; and how it is read again."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill import distributed, files
from distill.errors import DataError, ResourceError

if TYPE_CHECKING:
    from accelerate import Accelerator

NAME = "metrics.jsonl"


def read(path: Path) -> list[dict[str, Any]]:
    """The steps of a metrics.jsonl, none if there is no such file. A last line that is half written, which a kill leaves, is none.

    DataError for any other line that is no step.
    """
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    entries: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        if (entry := _entry(line)) is not None:
            entries.append(entry)
        elif number < len(lines) or line.endswith("\n"):
            raise DataError(f"{path}, line {number} is no step of a run: {line[:80]!r}.")
    return entries


def cut(output: Path, last: int) -> None:
    """Leave metrics.jsonl up to the step `last` that is resumed from; 0 empties it for a new run."""
    path = output / NAME
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if last and path.exists() else []
        kept = [line for line in lines if (entry := _entry(line)) and entry["step"] <= last]
        files.remove_unfinished(output, NAME)
        with files.published_file(path) as temporary:
            temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    except OSError as error:
        raise ResourceError(f"{path} cannot be written: {error}. Name another --output.") from error


def sync(output: Path) -> None:
    """What is logged outlives a power cut: before a checkpoint stands, so that the log never ends before it."""
    files.sync(output / NAME)


@contextmanager
def opened(
    output: Path, accelerator: "Accelerator", settings: Mapping[str, Any]
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that logs an entry: into metrics.jsonl on the main process, and to the trackers, which are told `settings`."""
    tracked = bool(settings["trackers"])
    if tracked:
        _start_trackers(output, accelerator, settings)
    file = (output / NAME).open("a", encoding="utf-8") if distributed.is_main() else None

    def log(entry: dict[str, Any]) -> None:
        if file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
        if tracked:
            numbers = {
                name: value for name, value in entry.items() if name != "step" and isinstance(value, int | float)
            }
            accelerator.log(numbers, step=entry["step"])

    try:
        yield log
    finally:
        if file:
            file.close()
        for tracker in accelerator.trackers:  # end_training() would leave the process group too
            tracker.finish()


def _start_trackers(output: Path, accelerator: "Accelerator", settings: Mapping[str, Any]) -> None:
    """Project distill, a run by the name of its folder; what a tracker keeps on this machine lies in it, where it can be told so."""
    flat = {name: value for name, value in settings.items() if isinstance(value, int | float | str)}
    options = {"trackio": {"name": output.name}, "wandb": {"name": output.name, "dir": str(output)}}
    try:
        accelerator.init_trackers("distill", config=flat, init_kwargs=options)
    except Exception as error:  # of three libraries, for want of an account, a network, a disk
        reason = " ".join(str(error).split())[:300]
        raise ResourceError(
            f"{', '.join(settings['trackers'])} could not be started ({type(error).__name__}: {reason}). metrics.jsonl needs "
            "none of them: leave out --train.trackers. Without a network or an account: WANDB_MODE=offline for wandb; trackio "
            "is local as long as TRACKIO_SPACE_ID and TRACKIO_SERVER_URL are not set."
        ) from error


def _entry(line: str) -> dict[str, Any] | None:
    """The step that a line says something of; None for half a line, and for anything else."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and isinstance(entry.get("step"), int) else None
