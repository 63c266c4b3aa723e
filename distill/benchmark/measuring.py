"""How long calls take beside one another, how much memory they need, and on which machine.

A machine's speed drifts by more than the differences that matter. Calls to be compared therefore take turns, and a ratio
is of two times of one round.
"""

import ctypes
import datetime
import gc
import importlib.metadata
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from distill import distributed

Result = TypeVar("Result")
PROCESS = Path("/proc/self")


def in_turns(calls: Mapping[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Milliseconds of each call in each of `repeats` rounds.

    Nothing is run beforehand: call each once first, if what is done only once is not to count.
    """
    return turns({name: partial(milliseconds, call, device) for name, call in calls.items()}, repeats)


def turns(calls: Mapping[str, Callable[[], Result]], repeats: int) -> dict[str, list[Result]]:
    """What each call gives in each of `repeats` rounds. A round begins one call further on than the one before."""
    names = list(calls)
    found: dict[str, list[Result]] = {name: [] for name in names}
    for number in range(repeats):
        first = number % max(1, len(names))
        for name in names[first:] + names[:first]:
            found[name].append(calls[name]())
    return found


def milliseconds(call: Callable[[], object], device: torch.device) -> float:
    """Of one call; on CUDA from the device being idle to its having finished."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


def apart(function: Callable[..., Result], *arguments: object) -> Result:
    """`function(*arguments)` in a process of its own, with as many threads as this one.

    The function must be found by its name in a module, `__main__` included. MemoryError if the process is killed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", "distill.losses"])
    threads = (torch.get_num_threads(),)
    with ProcessPoolExecutor(1, context, initializer=torch.set_num_threads, initargs=threads) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool as error:
            raise MemoryError("its process was killed, which is what a machine out of memory does") from error


def extra_bytes(call: Callable[[], Tensor], like: Tensor) -> int | None:
    """The most memory in use during a call, beyond what was in use before and its result, which has the size of `like`.

    On CUDA what torch allocates; elsewhere resident memory, None where Linux's /proc is not there. That includes all that
    is loaded and warmed up on the way: make a small such call first, and measure `apart` from other work.
    """
    gc.collect()
    if like.is_cuda:
        torch.cuda.synchronize(like.device)
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(like.device) + like.nbytes
        torch.cuda.reset_peak_memory_stats(like.device)
        call()
        return max(0, torch.cuda.max_memory_allocated(like.device) - before)
    if not (PROCESS / "clear_refs").exists():
        return None
    _return_free_memory()
    result = torch.ones_like(like)  # ones are written, zeros are only promised
    before = _resident("VmRSS")
    del result
    (PROCESS / "clear_refs").write_text("5")  # the peak starts here
    call()
    return max(0, _resident("VmHWM") - before)


def _return_free_memory() -> None:
    """What malloc keeps for later counts as resident. glibc alone can be asked to give it back."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _resident(name: str) -> int:
    return _kilobytes(PROCESS / "status", name) * 1024


def _kilobytes(path: Path, name: str) -> int:
    """Of a line such as `VmRSS:     1234 kB`."""
    for line in path.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise ValueError(f"{path} has no line {name}.")


def available_bytes(device: torch.device) -> int | None:
    """Memory that can be had without another program losing any; None where Linux's /proc is not there."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    path = Path("/proc/meminfo")
    return _kilobytes(path, "MemAvailable") * 1024 if path.exists() else None


def machine(*packages: str) -> str:
    """The processor, the accelerator if any, versions of Python, torch and `packages`, and the date."""
    if distributed.device().type == "cuda":
        parts = [torch.cuda.get_device_name()]
    else:
        memory = f", {os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB"
        parts = [f"{torch.get_num_threads()} threads on {_processor()}{memory}"]
    parts.append(f"Python {platform.python_version()}")
    parts += [f"{name} {version}" for name in ("torch", *packages) if (version := _version(name))]
    return ", ".join([*parts, datetime.date.today().isoformat()])


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """A table whose columns are the keys of the first row, in its order."""
    names = list(rows[0]) if rows else []
    lines = [names, ["---"] * len(names), *([row[name] for name in names] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
