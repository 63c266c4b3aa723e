"""Texts to an exported student, in forked processes that say on a shared board what they are doing; and what stopping one leaves."""

import json
import mmap
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import runs
import torch
import torch.distributed as dist
from disturbed import disturbed
from scenes import nothing_unfinished, tree

from distill import cli, distributed, files
from distill.embed import embed, job
from distill.encoder import Encoder
from distill.store import Store, text_keys, verify
from distill.training import checkpoint, loop
from distill.verify_resume.comparing import compare

PHASES = ("tokenise", "embed", "shard write", "train", "checkpoint", "export")
TEXTS = runs.texts(48)
SAVE_EVERY = 2
OPTIONS: dict[str, Any] = {"count": 48, "batch_size": 8, "epochs": 2.0, "bank_size": 16, "loss": "sum", "dropout": 0.1}
OPTIONS |= {"ema_decay": 0.9, "save_every": SAVE_EVERY, "keep_checkpoints": 2}


class Board:
    """Numbers that forked processes share: how often each phase began, seconds in each, records published, the last step begun."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 4096)
        self.numbers = memoryview(self._memory).cast("d")

    def began(self, phase: int) -> int:
        return int(self.numbers[phase])

    def mean_seconds(self, phase: int) -> float:
        return self.numbers[8 + phase] / max(1.0, self.numbers[phase])

    @property
    def published(self) -> int:
        return int(self.numbers[16])

    @property
    def step(self) -> int:
        return int(self.numbers[17])

    def watch(self) -> None:
        """From now on this process's phases are told. The main process's alone: others would count twice."""
        if not distributed.is_main():
            return
        for phase, (owner, name) in enumerate(
            [
                (Encoder, "tokenize"),
                (Encoder, "compute"),
                (Store, "append"),
                (loop._Loop, "_step"),
                (checkpoint, "save"),
                (Encoder, "save_pretrained"),
            ]
        ):
            setattr(owner, name, self._told(phase, getattr(owner, name)))
        publish = Store.publish

        def published(store: Store, records: Any) -> None:
            publish(store, records)
            self.numbers[16] += len(records)

        Store.publish = published  # type: ignore[method-assign]

    def _told(self, phase: int, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            self.numbers[phase] += 1
            if phase == 3:
                self.numbers[17] = arguments[1]
            began = time.monotonic()
            try:
                return original(*arguments, **options)
            finally:
                self.numbers[8 + phase] += time.monotonic() - began

        return call


def run_all(model: str, folder: Path) -> None:
    """Embed, train, export; each goes on where it was stopped."""
    job.WINDOW, job.BATCH_TOKENS = 16, 48
    embed(TEXTS, runs.teacher(model), folder / "store", flush_seconds=0.0)
    run = runs.small_run(model, folder / "run", store=folder / "store", resume=True, **OPTIONS)
    distributed.main_first(partial(_export, run.student, folder / "student"))


def _export(student: Encoder, path: Path) -> None:
    files.recover(path)
    student.save_pretrained(path)


@dataclass
class Processes:
    """Forked processes of one run."""

    pids: list[int]
    codes: dict[int, int] = field(default_factory=dict)

    def running(self) -> bool:
        for pid in self.pids:
            if pid not in self.codes:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    self.codes[pid] = os.waitstatus_to_exitcode(status)
        return len(self.codes) < len(self.pids)

    def signal(self, number: int) -> None:
        """To all at once, as a terminal does: one that is told later may find the first gone."""
        with suppress(ProcessLookupError):
            os.killpg(self.pids[0], number)

    def wait(self, timeout_seconds: float = 120) -> list[int]:
        end = time.monotonic() + timeout_seconds
        while self.running():
            if time.monotonic() > end:
                self.signal(signal.SIGKILL)
                end += 10
            time.sleep(0.002)
        return [self.codes[pid] for pid in self.pids]


@dataclass(frozen=True, kw_only=True)
class Nothing:
    """A recipe without flags."""


def start(act: Callable[[], Any], world: int, folder: Path, board: Board | None = None) -> Processes:
    """`act` in so many forked processes, which end as a recipe does: with its exit code, on a signal too."""
    folder.mkdir(parents=True, exist_ok=True)
    meeting = folder / f".meeting-{time.monotonic_ns()}"
    pids = []
    for rank in range(world):
        if (pid := os.fork()) == 0:
            _live(act, rank, world, meeting, folder, board)
        pids.append(pid)
        os.setpgid(pid, pids[0])
    return Processes(pids)


def _live(act: Callable[[], Any], rank: int, world: int, meeting: Path, folder: Path, board: Board | None) -> None:
    code = 99
    try:
        out = os.open(folder / f"{rank}.out", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        if world > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            os.environ |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
            dist.init_process_group("gloo", init_method=f"file://{meeting}", world_size=world, rank=rank)
        if board:
            board.watch()

        def main(recipe: Nothing) -> None:
            """The pipeline."""
            act()

        code = cli._run(main, Nothing, [], False)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


@dataclass(frozen=True)
class Reference:
    """An uninterrupted run of so many processes, and how often each phase began and how long it took."""

    folder: Path
    world: int
    began: list[int]
    seconds: list[float]
    student: dict[str, str]
    vectors: torch.Tensor


def reference(model: str, folder: Path, world: int) -> Reference:
    board = Board()
    codes = start(partial(run_all, model, folder), world, folder, board).wait()
    assert codes == [0] * world, (folder / "0.out").read_text()
    phases = range(len(PHASES))
    return Reference(
        folder,
        world,
        [board.began(phase) for phase in phases],
        [board.mean_seconds(phase) for phase in phases],
        tree(folder / "student"),
        Store.open(folder / "store").vectors(TEXTS),
    )


def stop_and_resume(
    model: str, whole: Reference, folder: Path, phase: int, number: int, draw: random.Random
) -> str | None:
    """Signal a run at a random instant of a phase, look at what it left, and go on. What is wrong, "" if nothing; None if it was over before."""
    shutil.rmtree(folder, ignore_errors=True)
    board, act = Board(), partial(run_all, model, folder)
    group = start(act, whole.world, folder, board)
    when, wait = draw.randint(1, whole.began[phase]), draw.uniform(0, 1.5 * whole.seconds[phase])
    while group.running() and board.began(phase) < when:
        time.sleep(0.0002)
    time.sleep(wait)
    over = not group.running()
    group.signal(number)
    codes = group.wait()
    if number != signal.SIGKILL and not set(codes) <= {0, 128 + number}:
        return f"exit codes {codes}: {(folder / '0.out').read_text()[-2000:]}"
    for name, action in (("left", _look), ("resumed", _resume), ("end", _compare)):
        outcome = disturbed(partial(action, model, whole, folder, board), folder)
        if outcome.how != "done":
            return f"{name}: {outcome.how} {outcome.text}"
    return None if over else ""


def _look(model: str, whole: Reference, folder: Path, board: Board) -> None:
    """Everything that is there is whole and right, and no more than a shard or a save interval is lost."""
    stored = 0
    if (folder / "store" / "manifest.json").exists():
        assert verify(folder / "store") == {}
        store = Store.open(folder / "store")
        rows, stored = store.find(text_keys(TEXTS)), len(store.shards)
        assert torch.equal(store.take(rows[rows >= 0]), whole.vectors[torch.from_numpy(rows >= 0)])
    assert stored >= board.published
    newest, damaged = checkpoint._newest_whole(folder / "run" / "checkpoints")
    assert damaged == []
    saved = int(newest.name.removeprefix("step-")) if newest else 0
    assert board.step - saved <= SAVE_EVERY, (board.step, saved)
    if (folder / "student").exists():
        assert tree(folder / "student") == whole.student


def _resume(model: str, whole: Reference, folder: Path, board: Board) -> None:
    codes = start(partial(run_all, model, folder), whole.world, folder).wait()
    assert codes == [0] * whole.world, (folder / "0.out").read_text()[-3000:]


def _compare(model: str, whole: Reference, folder: Path, board: Board) -> None:
    assert torch.equal(Store.open(folder / "store").vectors(TEXTS), whole.vectors)
    compare(whole.folder / "run", folder / "run")
    assert tree(folder / "student") == whole.student
    nothing_unfinished(folder / "store")
    nothing_unfinished(folder / "run")
    assert not list(folder.glob(".student*"))


def kills(model: str, folder: str, world: int, count: int, signals: list[int], seed: int) -> dict[str, Any]:
    """In a process of its own: `count` stops, phases in turn; how many were in time, by phase, and what was wrong."""
    draw, place = random.Random(seed), Path(folder)
    whole = reference(model, place / "whole", world)
    done = dict.fromkeys(PHASES, 0)
    wrong: list[str] = []
    tried = 0
    while sum(done.values()) < count and tried < 4 * count + 20:
        phase, number = tried % len(PHASES), signals[tried % len(signals)]
        problem = stop_and_resume(model, whole, place / "stopped", phase, number, draw)
        tried += 1
        if problem:
            wrong.append(f"signal {number} in {PHASES[phase]}: {problem}")
        done[PHASES[phase]] += problem is not None
    return {"done": done, "wrong": wrong, "began": json.loads(json.dumps(whole.began))}
