"""A run's folder belongs to one run at a time."""

import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import runs
from filelock import FileLock, Timeout

from distill import cli, run_lock
from distill.embed import embed
from distill.errors import RecipeError
from distill.training import TrainConfig

REFUSED = r"another run is writing .* name another --output"
HOLDER = "import sys, time\nfrom pathlib import Path\nfrom distill import run_lock\nrun_lock.take(Path(sys.argv[1]))\nprint('held', flush=True)\ntime.sleep(600)"


@dataclass(frozen=True)
class Recipe:
    output: Path
    train: TrainConfig = field(default_factory=TrainConfig)


@pytest.fixture
def other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FileLock:
    """The lock of the folder, as another run would take it."""
    monkeypatch.setattr(run_lock, "WAIT_SECONDS", 0.1)
    return FileLock(tmp_path / run_lock.NAME)


def test_a_recipe_is_not_begun_where_another_runs(other: FileLock, tmp_path: Path) -> None:
    with other, pytest.raises(RecipeError, match=REFUSED):
        cli.record(Recipe(tmp_path), tmp_path)
    assert not (tmp_path / "recipe.json").exists()
    cli.record(Recipe(tmp_path), tmp_path)
    cli.record(Recipe(tmp_path), tmp_path)  # one process may come again
    with pytest.raises(Timeout):
        other.acquire(timeout=0)


def test_training_takes_the_folder_and_gives_it_back(other: FileLock, tiny_bert: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    embed(runs.texts(40), runs.teacher(tiny_bert), store)
    checkpoint = tmp_path / "checkpoints" / "step-00000003"
    checkpoint.mkdir(parents=True)
    with other, pytest.raises(RecipeError, match=REFUSED):
        runs.small_run(tiny_bert, tmp_path, store=store, kind="static", steps=1)
    assert checkpoint.exists()
    with run_lock.held(tmp_path):
        runs.small_run(tiny_bert, tmp_path, store=store, kind="static", steps=1)
        with pytest.raises(Timeout):  # the block has it still
            other.acquire(timeout=0)
    assert not checkpoint.exists()
    other.acquire(timeout=0)


def test_a_kill_lets_go(other: FileLock, tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "held\n"
        with pytest.raises(RecipeError, match=REFUSED):
            run_lock.take(tmp_path)
        os.kill(process.pid, signal.SIGKILL)
    with run_lock.held(tmp_path):
        pass
