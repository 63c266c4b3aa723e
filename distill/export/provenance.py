"""Where a student comes from, as its folder and its card say it."""

import importlib.metadata
import shlex
import sys
from dataclasses import dataclass
from typing import Any

from distill import distributed
from distill.encoder import Encoder
from distill.space import Space


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where a student comes from."""

    teacher: Encoder
    data: str
    loss: str
    command: str = ""
    space: Space | None = None
    """Given where `teacher` is one that was cut by `narrow`: its directions go into the folder."""

    def as_json(self) -> dict[str, Any]:
        return {
            "teacher": self.teacher.name,
            "teacher_commit": self.teacher.commit,
            "teacher_parameters": self.teacher.parameter_count,
            "teacher_fingerprint": self.teacher.fingerprint(),
            "data": self.data,
            "loss": self.loss,
            "command": self.command or this_command(),
            "versions": {name: _version(name) for name in ("distill", "torch", "transformers", "accelerate")},
        } | ({"space": self.space.as_json()} if self.space else {})


def this_command() -> str:
    """The command line of this program, as it can be typed again."""
    processes = distributed.world_size()
    launcher = ["python"] if processes == 1 else ["torchrun", "--nproc-per-node", str(processes)]
    return shlex.join([*launcher, *sys.argv])


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # run from its folder
        return "not installed"
