"""What a run logs: metrics.jsonl, one line a step, and the trackers that were asked for."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill import distributed, files
from distill.errors import ResourceError

if TYPE_CHECKING:
    from accelerate import Accelerator

NAME = "metrics.jsonl"


def cut(output: Path, last: int) -> None:
    """Leave metrics.jsonl up to the step `last` that is resumed from; 0 empties it for a new run."""
    path = output / NAME
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if last and path.exists() else []
        kept = [line for line in lines if _step(line) <= last]
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
        flat = {name: value for name, value in settings.items() if isinstance(value, int | float | str)}
        accelerator.init_trackers("distill", config=flat)
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


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return math.inf
