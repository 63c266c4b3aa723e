"""Files and folders appear whole or not at all."""

import json
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from distill import files


class Interrupted(BaseException):
    """As Ctrl-C: no Exception."""


def test_a_file_is_published_whole_and_nothing_else_stays(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.txt"
    with files.published_file(path) as temporary:
        temporary.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"
    assert path.stat().st_mode & 0o777 == 0o644
    assert [*path.parent.iterdir()] == [path]


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[int | str]:
    """What is flushed to the disk, by its inode, and renamed, in its order."""
    calls: list[int | str] = []
    fsync, exchange = os.fsync, files.exchange

    def renamed(change: Callable[..., bool | None]) -> Callable[..., bool | None]:
        def noted(*paths: Path) -> bool | None:
            calls.append("renamed")
            return change(*paths)

        return noted

    monkeypatch.setattr(os, "fsync", lambda file: (calls.append(os.fstat(file).st_ino), fsync(file)))
    monkeypatch.setattr(os, "replace", renamed(os.replace))
    monkeypatch.setattr(os, "rename", renamed(os.rename))
    monkeypatch.setattr(files, "exchange", renamed(exchange))
    return calls


def test_a_file_outlives_a_power_cut(tmp_path: Path, done: list[int | str]) -> None:
    """Its content is on the disk before it has its name, and its name before the writer goes on."""
    path = tmp_path / "a.txt"
    with files.published_file(path) as temporary:
        temporary.write_text("new")
    assert done == [path.stat().st_ino, "renamed", tmp_path.stat().st_ino]


def test_a_folder_outlives_a_power_cut(tmp_path: Path, done: list[int | str]) -> None:
    path = tmp_path / "model"
    for content in ("old", "new"):
        done.clear()
        _publish(path, content)
        inside = [item.stat().st_ino for item in (*path.rglob("*"), path)]
        assert sorted(map(str, done[: len(inside)])) == sorted(map(str, inside))
        assert {*done[len(inside) : -1]} == {"renamed"}
        assert done[-1] == tmp_path.stat().st_ino


@pytest.mark.parametrize("error", [ValueError, Interrupted])
def test_a_failed_write_leaves_the_file_before(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(error):
        _fail_halfway(files.published_file(path), ".", error)
    assert path.read_text() == "old"
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize("error", [ValueError, Interrupted])
def test_a_failed_folder_leaves_the_folder_before(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "model"
    _publish(path, "old")
    with pytest.raises(error):
        _fail_halfway(files.published_folder(path), "a", error)
    assert (path / "a").read_text() == "old"
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize("failing", range(3))  # where two folders cannot be exchanged
def test_every_rename_of_a_folder_may_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    path = tmp_path / "model"
    _publish(path, "old")
    rename, calls = os.rename, iter(range(10))

    def sometimes(source: Path, target: Path) -> None:
        if next(calls) == failing:
            raise OSError("no")
        rename(source, target)

    monkeypatch.setattr(os, "rename", sometimes)
    monkeypatch.setattr(files, "exchange", lambda one, other: False)
    if failing < 2:
        with pytest.raises(OSError, match="no"):
            _publish(path, "new")
    else:
        _publish(path, "new")
    assert (path / "a").read_text() == ("old" if failing < 2 else "new")
    assert [*tmp_path.iterdir()] == [path]


def test_two_folders_change_places_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model"
    _publish(path, "old")
    monkeypatch.setattr(os, "rename", None)  # it is not needed
    _publish(path, "new")
    assert (path / "a").read_text() == "new"
    assert [*tmp_path.iterdir()] == [path]
    assert not files.exchange(path, tmp_path / "nothing")
    assert (path / "a").read_text() == "new"


@pytest.mark.parametrize("again", [files.recover, lambda path: _publish(path, "new")])
def test_a_folder_that_a_killed_writer_moved_aside_is_put_back(tmp_path: Path, again: Callable[[Path], None]) -> None:
    path = tmp_path / "model"
    _publish(path, "old")
    path.rename(tmp_path / ".model.abcd1234.old")
    (tmp_path / ".model.abcd1234").mkdir()
    again(path)
    assert (path / "a").read_text() in ("old", "new")
    files.recover(path)
    assert [*tmp_path.iterdir()] == [path]


def test_a_folder_takes_the_place_of_another(tmp_path: Path) -> None:
    path = tmp_path / "model"
    _publish(path, "old")
    (path / "left over").write_text("")
    _publish(path, "new")
    assert [item.name for item in path.iterdir()] == ["a"]
    assert path.stat().st_mode & 0o777 == 0o755
    assert [*tmp_path.iterdir()] == [path]


def test_a_folder_that_a_link_points_to_is_replaced_and_the_link_stays(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "place").mkdir()
    path, real = tmp_path / "place" / "model", tmp_path / "disk" / "student"
    path.symlink_to(real)
    for content in ("old", "new"):  # where nothing is yet, and where a folder is
        _publish(path, content)
        assert path.is_symlink()
        assert (real / "a").read_text() == (path / "a").read_text() == content
    assert [*(tmp_path / "place").iterdir()] == [path]
    assert [*(tmp_path / "disk").iterdir()] == [real]


def test_removal_leaves_no_half_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "step-1"
    _publish(path, "old")

    def killed(path: Path) -> None:
        raise Interrupted

    with monkeypatch.context() as context:
        context.setattr(files.shutil, "rmtree", killed)
        with pytest.raises(Interrupted):
            files.remove_folder(path)
    assert not path.exists()
    (tmp_path / "step-2").mkdir()
    (tmp_path / ".other.x").write_text("")
    files.remove_unfinished(tmp_path, "step-*")
    assert sorted(item.name for item in tmp_path.iterdir()) == [".other.x", "step-2"]


def test_neighbours_are_no_leftovers(tmp_path: Path) -> None:
    names = [".store.v2.abcd1234", ".store.v2.abcd1234.old", ".store.abc-lock", ".store-lock", ".stor[e].abcd1234"]
    for name in [*names, ".store.abcd1234", ".store.abcd1234.old"]:
        (tmp_path / name).mkdir()
    files.recover(tmp_path / "store")
    assert sorted(item.name for item in tmp_path.iterdir()) == sorted([*names, "store"])
    files.recover(tmp_path / "stor[e]")
    assert not (tmp_path / ".stor[e].abcd1234").exists()


def test_json_survives_any_text(tmp_path: Path) -> None:
    value = {"text": "naïve 漢 \ud800 \0", "numbers": [1, 2.5, None]}
    files.write_json(tmp_path / "a.json", value)
    raw = (tmp_path / "a.json").read_bytes()
    assert json.loads(raw.decode("utf-8")) == value
    assert "漢".encode() in raw


def test_hashes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc" * 2_000_000)
    seen: list[int] = []
    assert files.sha256(tmp_path / "a", seen.append) == files.digest(b"abc" * 2_000_000)
    assert sum(seen) == 6_000_000


def _publish(path: Path, content: str) -> None:
    with files.published_folder(path) as temporary:
        (temporary / "a").write_text(content)


def _fail_halfway(published: AbstractContextManager[Path], name: str, error: type[BaseException]) -> None:
    with published as temporary:
        (temporary / name).write_text("half")
        raise error


def test_a_published_folder_can_be_read_by_everybody(tmp_path: Path) -> None:
    with files.published_folder(tmp_path / "shared") as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "private").touch(mode=0o600)
    modes = {
        path.name: path.stat().st_mode & 0o777 for path in [tmp_path / "shared", *(tmp_path / "shared").rglob("*")]
    }
    mask = os.umask(0o022)
    os.umask(mask)
    assert modes == {"shared": 0o777 & ~mask, "inner": 0o777 & ~mask, "private": 0o666 & ~mask}
