"""Every call of every save path fails, or is the last thing its process does: nothing that was whole is lost, and the next run mends it.

Each trial is a forked process (disturbed.py) on a fresh copy of a scene (scenes.py). Four kinds of trial at every call
(open, fsync, rename, unlink, ...), two at bytes of the files that are written.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import counts
import processes
import pytest
import torch
from disturbed import AT_A_BYTE, AT_A_CALL, disturbed
from safetensors.torch import save_file
from scenes import Scene, fresh, scenes

from distill import files
from distill.store import compression

NAMES = [
    "store: rows are added",
    "store: made and filled",
    "store: a shard is taken out",
    "store: compressed",
    "checkpoint",
    "export and report",
    "embed",
    "train",
]


def sweep(model: str, folder: str, calls: int, bytes_: int) -> dict[str, Any]:
    """In a process of its own: trials of all scenes, at most `calls` of each mode; how many there were, and what went wrong."""
    place, found = Path(folder), {}
    for name, scene in scenes(Path(model), place / "prepared").items():
        all_there_are, chosen = trials(scene, place / name, bytes_), []
        for mode in AT_A_CALL + AT_A_BYTE:  # some of each
            at = [one for one in all_there_are if one[0] == mode]
            chosen += [at[number] for number in compression.spread(len(at), calls)]
        problems = [
            f"{mode} at {at}: {problem}" for mode, at in chosen if (problem := trial(scene, place / name, mode, at))
        ]
        found[name] = {"count": len(chosen), "wrong": problems}
    return found


def trials(scene: Scene, folder: Path, bytes_: int) -> list[tuple[str, int]]:
    """Each mode at each call that the act makes, and at some bytes of the largest file that it writes."""
    fresh(scene.build, folder)
    before = {item: item.stat().st_mtime_ns for item in folder.rglob("*")}
    whole = disturbed(partial(scene.act, folder), folder)
    assert whole.how == "done", whole.text
    written = [item for item in folder.rglob("*") if item.is_file() and before.get(item) != item.stat().st_mtime_ns]
    largest = max([item.stat().st_size for item in written], default=1)
    found = [(mode, at) for mode in AT_A_CALL for at in range(1, whole.calls + 1)]
    return found + [(mode, largest * place // bytes_) for mode in AT_A_BYTE for place in range(bytes_)]


def trial(scene: Scene, folder: Path, mode: str, at: int) -> str:
    """What is not as promised after one disturbance; empty if all is."""
    fresh(scene.build, folder)
    outcome = disturbed(partial(scene.act, folder), folder, mode, at)
    if outcome.how not in ("done", "error", "killed"):
        return f"the act: {outcome.how} {outcome.text}"
    for step, action in (("check", scene.check), ("again", scene.act), ("finished", scene.finished)):
        after = disturbed(partial(action, folder), folder)
        if after.how != "done":
            return f"{outcome.how} ({outcome.text}), then {step}: {after.text}"
    return ""


@pytest.fixture(scope="module", params=[False, pytest.param(True, marks=pytest.mark.slow)], ids=["sample", "full"])
def swept(request: pytest.FixtureRequest, tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder, full = tmp_path_factory.mktemp("sweep"), bool(request.param)
    options = {"calls": counts.amount("calls", full), "bytes_": counts.amount("bytes", full)}
    [found] = processes.run(
        sweep, 1, folder, model=tiny_bert, folder=folder / "trials", timeout_seconds=7000 if full else 900, **options
    )
    return found


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_lost_at_any_call_of(swept: dict[str, Any], name: str) -> None:
    done = swept[name]
    counts.note(1, f"disturbed calls and bytes, {name}", done["count"], len(done["wrong"]))
    assert done["count"] > 5
    assert done["wrong"] == [], "\n".join(done["wrong"][:5])


def test_every_scene_has_a_test(swept: dict[str, Any]) -> None:
    assert sorted(swept) == sorted(NAMES)


# What libraries write by themselves


@pytest.mark.parametrize("publish", [files.published_file, files.published_folder])
def test_a_full_disk_is_an_os_error_whoever_writes(tmp_path: Path, publish: Callable[[Path], Any]) -> None:
    def write() -> None:
        with publish(tmp_path / "new") as temporary:
            file = temporary / "vectors.safetensors" if temporary.is_dir() else temporary
            save_file({"vectors": torch.zeros(5000)}, file)

    full = disturbed(write, tmp_path, "full", 100)
    assert (full.how, full.text) == ("error", "OSError: [Errno 27] File too large")
    assert list(tmp_path.iterdir()) == []


# That the sweep can fail


def careless(folder: Path) -> None:
    """Writes in place: what a save path must not do."""
    (folder / "store" / "manifest.json").write_text((folder / "store" / "manifest.json").read_text() + " ")
    (folder / "other").mkdir(exist_ok=True)


def careless_sweep(folder: str) -> list[str]:
    from scenes import build_store, check_store

    scene = Scene(build_store, careless, check_store, check_store)
    place = Path(folder) / "scene"
    return [problem for mode, at in trials(scene, place, 4) if (problem := trial(scene, place, mode, at))]


def test_a_file_that_is_written_in_place_is_caught(tmp_path: Path) -> None:
    [found] = processes.run(careless_sweep, 1, tmp_path, folder=tmp_path)
    assert found
