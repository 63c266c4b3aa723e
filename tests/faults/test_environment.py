"""The machine says no: a disk that fills up, folders that may not be written, a process that is gone, no network. One message each."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import counts
import pipeline
import processes
import pytest
import runs
from disturbed import disturbed

from distill import cli, hub
from distill.embed import embed
from distill.errors import ResourceError
from distill.store import Store
from distill.training import TrainConfig, loop

NOBODY = 65534
TEXTS = runs.texts(40)


def as_nobody(model: str, warm: Path, act: Callable[[], Any]) -> None:
    """`act` as a user without rights, if this is root; what is imported on first use is imported before."""
    runs.small_run(model, warm / "run", store=warm / "store", count=4, kind="static")
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    act()


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user gets to: pytest's own are private."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    if os.geteuid() == 0 and not all(parent.stat().st_mode & 0o001 for parent in folder.parents):
        folder.rmdir()
        pytest.skip("no other user gets to TMPDIR")
    yield folder
    subprocess.run(["chmod", "-R", "u+w", str(folder)], check=True)
    shutil.rmtree(folder)


# Folders that may not be written


def unwritable(model: str, folder: str) -> dict[str, list[str]]:
    """In a process of its own: what each act says as a user who may read and not write."""
    place = Path(folder)
    store = place / "store"
    acts: dict[str, Callable[[], Any]] = {
        "read a store": lambda: Store.open(store).vectors(TEXTS[:20]),
        "embed what is stored": lambda: embed(TEXTS[:20], runs.teacher(model), store),
        "embed more": lambda: embed(TEXTS, runs.teacher(model), store),
        "make a store": lambda: embed(TEXTS, runs.teacher(model), place / "new"),
        "record a recipe": lambda: cli.record(pipeline.Nothing(), place / "run"),
        "train": lambda: runs.small_run(model, place / "run", store=store, count=20, kind="static"),
        "resolve a path without a cache": lambda: hub.resolve_model(model),
    }
    warm = place.parent / "warm"
    outcomes = {name: disturbed(partial(as_nobody, model, warm / name, act), place) for name, act in acts.items()}
    return {name: [outcome.how, outcome.text] for name, outcome in outcomes.items()}


def test_folders_that_may_not_be_written(
    tiny_bert: Path, open_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = shutil.copytree(tiny_bert, open_folder / "model")
    (model / "model.safetensors").chmod(0o644)  # safetensors writes private files
    place = open_folder / "place"
    embed(TEXTS[:20], runs.teacher(model), place / "store")
    for item in (place / "store").iterdir():
        item.chmod(0o444)
    (place / "store").chmod(0o555)
    place.chmod(0o555)
    monkeypatch.setenv("DISTILL_HOME", str(place / "cache"))
    [said] = processes.run(unwritable, 1, tmp_path, model=model, folder=place)
    for name in ("read a store", "embed what is stored", "resolve a path without a cache"):
        assert said[name] == ["done", ""], said[name]
    for name, words in {
        "embed more": ["ResourceError", str(place / "store"), "Permission denied", "--store"],
        "make a store": ["ResourceError", str(place / "new"), "Permission denied", "--store"],
        "record a recipe": ["ResourceError", str(place / "run"), "Permission denied", "--output"],
        "train": ["ResourceError", str(place / "run"), "Permission denied"],
    }.items():
        assert said[name][0] == "error", said[name]
        assert all(word in said[name][1] for word in words), said[name]
    counts.note(9, "acts as a user who may not write", len(said))


# A disk that is full


@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts a disk")
def test_a_disk_without_room_is_told_before_anything_is_computed(tiny_bert: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("no disk can be mounted here")
    try:
        embed(TEXTS[:20], runs.teacher(tiny_bert), disk / "store")
        with pytest.raises(
            ResourceError, match=r"1,980 vectors of width 32 need [\d,]+ bytes under .*; [\d,]+ are free"
        ):
            embed(runs.texts(2000), runs.teacher(tiny_bert), disk / "store")
        (disk / "ballast").write_bytes(bytes(os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize))
        with pytest.raises(OSError, match="No space left"):
            runs.small_run(tiny_bert, disk / "run", store=disk / "store", count=20, kind="static")
        assert len(Store.open(disk / "store").vectors(TEXTS[:20])) == 20
        counts.note(1, "acts on a disk that is full", 2)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


# A process that is gone


@dataclass(frozen=True, kw_only=True)
class Slow:
    """Flags of a run that is slow enough to be caught."""

    model: str
    store: Path
    output: Path
    train: TrainConfig = field(default_factory=lambda: TrainConfig(epochs=40.0, save_every=1))


def slow_recipe(recipe: Slow) -> None:
    """A run of short steps."""
    step = loop._Loop._step

    def slowly(self: Any, number: int, ends: Any) -> Any:
        time.sleep(0.1)
        return step(self, number, ends)

    loop._Loop._step = slowly  # type: ignore[method-assign]
    options = {"epochs": recipe.train.epochs, "save_every": 1, "resume": recipe.train.resume}
    runs.small_run(recipe.model, recipe.output, store=recipe.store, kind="static", **options)


def run_recipe(model: str, store: str, output: str) -> int:
    """In one of several processes, as a recipe is run: with its messages and exit codes."""
    sys.argv = ["slow.py", "--model", model, "--store", store, "--output", output]
    cli.run(slow_recipe, Slow)


def test_when_one_process_is_killed_the_others_end_and_say_so(tiny_bert: Path, tmp_path: Path, full: bool) -> None:
    embed(TEXTS, runs.teacher(tiny_bert), tmp_path / "store")
    for world in (2, 3, 4) if full else (2,):
        output = tmp_path / f"run-{world}"
        group = processes.start(run_recipe, world, tmp_path, model=tiny_bert, store=tmp_path / "store", output=output)
        group.wait_until(lambda output=output: any((output / "checkpoints").glob("step-*")), 400)
        began, victim = time.monotonic(), world - 1
        group.processes[victim].kill()
        codes = group.wait(60)
        assert time.monotonic() - began < 60
        assert codes[victim] == -signal.SIGKILL
        assert {code for number, code in enumerate(codes) if number != victim} == {6}, group.output()
        said = (group.folder / "0.out").read_text()
        assert "error: another process of this run is gone" in said
        assert "Traceback" not in said
        assert "--train.resume" in said
        counts.note(9, "one process of 2-4 killed, the others gone in 60 s with one message", 1)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["a worker is killed", "the launcher is terminated"])
def test_under_a_launcher(how: str, tiny_bert: Path, tmp_path: Path) -> None:
    embed(TEXTS, runs.teacher(tiny_bert), tmp_path / "store")
    output = tmp_path / "run"
    group = processes.launch(run_recipe, 2, tmp_path, model=tiny_bert, store=tmp_path / "store", output=output)
    group.wait_until(lambda: any((output / "checkpoints").glob("step-*")), 400)
    launcher, began = group.processes[0].pid, time.monotonic()
    workers = [int(pid) for pid in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()]
    if how == "a worker is killed":
        os.kill(workers[-1], signal.SIGKILL)
    else:
        group.processes[0].terminate()
    assert group.wait(60) != [0]
    assert time.monotonic() - began < (60 if how == "a worker is killed" else 20)
    assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()]
    said = group.output()
    if how == "a worker is killed":  # the other finds it gone, or is told to stop by the launcher: whichever is first
        assert "SIGKILL" in said
        assert "another process of this run is gone" in said or "saved" in said
    else:
        assert "everything is saved" in said
    counts.note(9, how, 1)


# No network


class Failing(BaseHTTPRequestHandler):
    """A hub that refuses, hangs, or breaks off."""

    how = "500"

    def do_GET(self) -> None:
        if self.how == "hangs":
            time.sleep(15)
        elif self.how == "breaks off":
            self.send_response(200)
            self.send_header("Content-Length", "100000")
            self.end_headers()
            self.wfile.write(b'{"sha": ')
        else:
            self.send_error(int(self.how))

    do_HEAD = do_GET

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def failing_hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Failing)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.parametrize("how", ["429", "500", "503", "403", "hangs", "breaks off"])
def test_every_failure_of_the_hub_is_one_message(
    how: str, failing_hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """As a recipe meets it: exit code 6, one message with the ways out, no traceback. More of the hub: tests/test_hub.py."""
    monkeypatch.setattr(Failing, "how", how)
    monkeypatch.setenv("HF_ENDPOINT", failing_hub)
    monkeypatch.setenv("DISTILL_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_ETAG_TIMEOUT", 2)
    code = cli._run(lambda recipe: hub.resolve_model("somebody/model", cache_dir=tmp_path), pipeline.Nothing, [], False)
    said = capsys.readouterr().err
    assert code == 6, said
    assert "error: Cannot get the model somebody/model" in said
    assert "give the path of a local folder" in said
    assert "Traceback" not in said
    counts.note(11, "failures of the hub, one message each", 1)
