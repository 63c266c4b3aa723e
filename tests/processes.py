"""Real processes for tests: spawned, never forked; joined by gloo over a file; killed, and their output shown, if they hang.

`run(function, 2, folder, texts=40)` calls a function of a test module in two processes and returns what each returned.
Arguments and results are JSON.
"""

import importlib
import json
import os
import subprocess
import sys
import time
import unittest
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import simulated_cuda  # noqa: F401  before torch: a child has the device that its parent has
import torch

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Group:
    """Processes of one call, rank 0 first, and the folder that holds what they print and return."""

    processes: list[subprocess.Popen[bytes]]
    folder: Path

    def wait(self, timeout_seconds: float = 180) -> list[int]:
        """Exit codes. Where one process failed, the others get 20 seconds more."""
        end, first_failure = time.monotonic() + timeout_seconds, 0.0
        while None in (codes := [process.poll() for process in self.processes]):
            if any(codes):
                first_failure = first_failure or time.monotonic()
                end = min(end, first_failure + 20)
            if time.monotonic() > end:
                self.kill()
                raise AssertionError(f"hung: {codes}\n{self.output()}")
            time.sleep(0.02)
        return [process.returncode for process in self.processes]

    def wait_until(self, condition: Callable[[], bool], timeout_seconds: float = 120) -> None:
        end = time.monotonic() + timeout_seconds
        while not condition():
            if time.monotonic() > end or all(process.poll() is not None for process in self.processes):
                self.kill()
                raise AssertionError(f"it never came to that\n{self.output()}")
            time.sleep(0.005)

    def kill(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()

    def output(self) -> str:
        files = sorted(self.folder.glob("*.out"))
        return "\n".join(f"--- {file.stem}\n{file.read_text(errors='replace')}" for file in files)

    def results(self) -> list[Any]:
        return [json.loads((self.folder / f"{rank}.json").read_text()) for rank in range(len(self.processes))]


def start(function: Callable[..., Any], world: int, folder: Path, /, **arguments: Any) -> Group:
    """Processes that join by a file."""
    place, call = _call(function, folder, arguments)
    processes = []
    for rank in range(world):
        environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        command = [sys.executable, *call, str(place / f"{rank}.json")]
        processes.append(_popen(command, place / f"{rank}.out", world, environment if world > 1 else {}))
    return Group(processes, place)


def launch(function: Callable[..., Any], world: int, folder: Path, /, **arguments: Any) -> Group:
    """The launcher alone, torchrun, whose processes join as distill has them join."""
    place, call = _call(function, folder, arguments)
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    return Group([_popen([sys.executable, *torchrun, *call, str(place / "0.json")], place / "0.out", world, {})], place)


def _call(function: Callable[..., Any], folder: Path, arguments: dict[str, Any]) -> tuple[Path, list[str]]:
    place = folder / f"call-{len(list(folder.glob('call-*'))) if folder.exists() else 0}"
    place.mkdir(parents=True)
    module = Path(sys.modules[function.__module__].__file__ or "").resolve()
    return place, [str(Path(__file__)), str(module), function.__name__, json.dumps(arguments, default=str)]


def _popen(command: list[str], output: Path, world: int, environment: dict[str, int]) -> subprocess.Popen[bytes]:
    fixed = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(ROOT)}
    if 0 < torch.cuda.device_count() < world:
        raise unittest.SkipTest(f"{world} processes share {torch.cuda.device_count()} device: they are tested on CPUs")
    given = {name: str(value) for name, value in environment.items()}
    with output.open("wb") as out:
        return subprocess.Popen(command, env={**os.environ, **fixed, **given}, stdout=out, stderr=out)


def run(
    function: Callable[..., Any], world: int, folder: Path, /, *, timeout_seconds: float = 180, **arguments: Any
) -> list[Any]:
    """What each process returned, in rank order."""
    group = start(function, world, folder, **arguments)
    codes = group.wait(timeout_seconds)
    assert not any(codes), f"exit codes {codes}\n{group.output()}"
    return group.results()


def _main(module: str, name: str, arguments: str, result: str) -> int:
    # Shapes are checked here too, in the first process alone: with that it takes twice as long to begin.
    if os.environ.get("RANK", "0") == "0":
        importlib.import_module("conftest")
    sys.path.append(str(Path(module).parent))
    import torch.distributed as dist

    from distill import distributed
    from distill.errors import DistillError

    function = getattr(importlib.import_module(Path(module).stem), name)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    if "MASTER_PORT" in os.environ:
        distributed.device()
    elif "WORLD_SIZE" in os.environ:
        place = Path(result).with_name("rendezvous").resolve()
        world, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
        dist.init_process_group("gloo", init_method=f"file://{place}", world_size=world, rank=rank)
    try:
        value = function(**json.loads(arguments))
    except DistillError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    if dist.is_initialized():
        distributed.finish()
        left = [name for name in _threads() if "gloo" in name]
        assert not left, f"something holds the group of processes: {left} could abort the interpreter's end"
    Path(result).write_text(json.dumps(value))
    return 0


def _threads() -> list[str]:
    """Names of this process's threads, where the system is Linux."""
    names = []
    for thread in Path("/proc/self/task").glob("*/comm"):
        with suppress(OSError):  # it has ended
            names.append(thread.read_text().strip())
    return names


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
