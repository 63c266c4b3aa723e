"""The save paths, each as a scene: what is there, what is done, and what has to be true whenever it was stopped.

A scene builds a folder, acts on it, and checks it: what was whole before the act is there and equal, and what the act was
to add is there whole or not at all. Acting again, undisturbed, has to reach the same end as if nothing had happened.
"""

import copy
import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import runs
import torch
from disturbed import disturbed
from torch import nn
from torch.optim import AdamW

from distill import files, runlog
from distill.embed import embed
from distill.encoder import Encoder
from distill.store import GOOD, Rows, Store, compress, text_keys, verify
from distill.store.shards import forget
from distill.training import checkpoint

FINGERPRINT = {"weights": "ab" * 32, "max_length": 64}
WIDTH = 4
OLD, NEW = [f"old {i}" for i in range(6)], [f"new {i}" for i in range(40)]


@dataclass(frozen=True)
class Scene:
    """build(folder); act(folder), which is disturbed; check(folder), after any disturbance; finished(folder), after acting again."""

    build: Callable[[Path], object]
    act: Callable[[Path], object]
    check: Callable[[Path], object]
    finished: Callable[[Path], object]


def rows(texts: list[str], width: int = WIDTH) -> Rows:
    """Each text's own vector, the same whenever it is asked for."""
    keys = text_keys(texts)
    vectors = (keys[:, :1] % 1000 / 100 + np.arange(1, width + 1)).astype(np.float32)
    return Rows(vectors, keys, np.ones(len(texts), np.int32), np.full(len(texts), GOOD, np.uint8))


def stored(path: Path, texts: list[str]) -> np.ndarray:
    """Which of the texts are stored; each that is has its own vector, and every file is what was written."""
    assert verify(path) == {}
    store = Store.open(path)
    found = store.find(text_keys(texts))
    known = found >= 0
    expected = rows([text for text, is_there in zip(texts, known, strict=True) if is_there])
    assert torch.equal(store.take(found[known]), torch.from_numpy(expected.vectors.astype(np.float16)).float())
    return known


def nothing_unfinished(folder: Path) -> None:
    """No temporary file or folder is left anywhere."""
    left = [item for item in folder.rglob(".*") if not item.name.endswith((".lock", "-lock"))]
    assert not left, left


def tree(folder: Path) -> dict[str, str]:
    """Every file of a folder by its digest."""
    return {str(item.relative_to(folder)): files.sha256(item) for item in folder.rglob("*") if item.is_file()}


# A shard and its manifest


def build_store(folder: Path) -> None:
    store = Store.open_or_create(folder / "store", FINGERPRINT, WIDTH)
    store.publish(store.append(rows(OLD)))


def add_rows(folder: Path) -> None:
    store = Store.open_or_create(folder / "store", FINGERPRINT, WIDTH)
    with store.lock():
        store = Store.open(folder / "store")
        store.remove_orphans()
        new = [text for text, row in zip(NEW, store.find(text_keys(NEW)), strict=True) if row < 0]
        if new:
            store.publish(store.append(rows(new)))


def check_store(folder: Path) -> None:
    assert stored(folder / "store", OLD).all()
    assert len(set(stored(folder / "store", NEW))) == 1


def finished_store(folder: Path) -> None:
    assert stored(folder / "store", OLD + NEW).all()
    assert Store.open(folder / "store").orphans() == []
    nothing_unfinished(folder)


# A store that is made now


def make_store(folder: Path) -> None:
    build_store(folder)
    add_rows(folder)


def check_made(folder: Path) -> None:
    if (folder / "store" / "manifest.json").exists():
        stored(folder / "store", OLD + NEW)


def remake_store(folder: Path) -> None:
    store = Store.open_or_create(folder / "store", FINGERPRINT, WIDTH)
    with store.lock():
        store = Store.open(folder / "store")
        store.remove_orphans()
        for texts in (OLD, NEW):
            if (store.find(text_keys(texts)) < 0).any():
                store.publish(store.append(rows(texts)))


# A damaged shard is taken out


def build_two_shards(folder: Path) -> None:
    build_store(folder)
    add_rows(folder)


def take_out(folder: Path) -> None:
    path = folder / "store"
    old = next(shard.file for shard in Store.open(path).shards if shard.rows == len(OLD))
    forget(path, [old])


def take_out_again(folder: Path) -> None:
    store = Store.open(folder / "store")
    if len(store) > len(NEW):
        take_out(folder)
    with store.lock():
        Store.open(folder / "store").remove_orphans()


def check_taken_out(folder: Path) -> None:
    assert stored(folder / "store", NEW).all()
    stored(folder / "store", OLD)


def finished_taken_out(folder: Path) -> None:
    check_taken_out(folder)
    assert not stored(folder / "store", OLD).any()
    nothing_unfinished(folder)


# A store in fewer bytes


def small_store(folder: Path) -> None:
    target = folder / "small"
    if not (target / "manifest.json").exists():
        compress(folder / "store", target, "int8")


def check_compressed(folder: Path) -> None:
    assert stored(folder / "store", OLD + NEW).all()
    if (folder / "small").exists():
        assert verify(folder / "small") == {}
        assert len(Store.open(folder / "small")) == len(OLD + NEW)


def finished_compressed(folder: Path) -> None:
    check_compressed(folder)
    assert (folder / "small" / "manifest.json").exists()
    nothing_unfinished(folder)


# Checkpoints


def parts(steps: int) -> tuple[nn.Module, AdamW]:
    """A model and its optimizer after so many steps."""
    torch.manual_seed(3)
    model = nn.Linear(5, 3)
    optimizer = AdamW(model.parameters(), lr=0.1)
    for _ in range(steps):
        model(torch.randn(4, 5)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def save_step(folder: Path, step: int) -> None:
    model, optimizer = parts(step)
    average = {"average": {"weight": model.weight.detach() * 2}}
    checkpoint.save(folder / "checkpoints", step, model, optimizer, {"note": step}, keep=2, further=average)


def build_checkpoints(folder: Path) -> None:
    for step in (1, 2):
        save_step(folder, step)


def loaded_step(folder: Path) -> int:
    """The step of the newest whole checkpoint, which is what was saved at that step."""
    model, optimizer = parts(0)
    held = {"average": {"weight": torch.zeros(3, 5)}}
    found = checkpoint.load_latest(folder / "checkpoints", model, optimizer, further=held)
    assert found is not None
    expected, its_optimizer = parts(found.step)
    assert found.state == {"note": found.step}
    assert torch.equal(model.weight, expected.weight)
    assert torch.equal(held["average"]["weight"], expected.weight * 2)
    moments = [one.state[one.param_groups[0]["params"][0]]["exp_avg"] for one in (optimizer, its_optimizer)]
    assert torch.equal(*moments)
    return found.step


def check_checkpoints(folder: Path) -> None:
    assert loaded_step(folder) in (2, 3)


def finished_checkpoints(folder: Path) -> None:
    assert loaded_step(folder) == 3
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == ["step-00000002", "step-00000003"]


# An exported folder, and a report


class Export:
    """A student's folder takes the place of another's."""

    def __init__(self, model: Path, folder: Path):
        teacher = runs.teacher(model)
        self.old = runs.student("static", teacher)
        self.new = copy.deepcopy(self.old)
        with torch.no_grad():
            for parameter in self.new.parameters():
                parameter += 1
        self.trees = {}
        for name, student in (("new", self.new), ("old", self.old)):
            student.save_pretrained(folder / name)
            self.trees[name] = tree(folder / name)

    def build(self, folder: Path) -> None:
        self._write(folder, self.old)

    def act(self, folder: Path) -> None:
        files.recover(folder / "student")
        self._write(folder, self.new)
        files.remove_unfinished(folder, "report.json")
        files.write_json(folder / "report.json", {"text": "new" * 100})

    def check(self, folder: Path) -> None:
        assert tree(folder / "student") in (self.trees["old"], self.trees["new"])
        if (folder / "report.json").exists():
            assert "new" in (folder / "report.json").read_text()
        Encoder.from_pretrained(folder / "student")

    def finished(self, folder: Path) -> None:
        assert tree(folder / "student") == self.trees["new"]
        nothing_unfinished(folder)

    def _write(self, folder: Path, student: Encoder) -> None:
        student.save_pretrained(folder / "student")


# The whole of embed(), and of a run


class Embedding:
    """Texts into a store, by the tiny teacher."""

    def __init__(self, model: Path, folder: Path):
        self.model, self.texts = model, runs.texts(60)
        self.expected = embed(self.texts, runs.teacher(model), folder / "expected").vectors(self.texts)

    def act(self, folder: Path) -> None:
        embed(self.texts, runs.teacher(self.model), folder / "store", flush_seconds=0.0)

    def check(self, folder: Path) -> None:
        if (folder / "store" / "manifest.json").exists():
            assert verify(folder / "store") == {}
            store = Store.open(folder / "store")
            rows = store.find(text_keys(self.texts))
            assert torch.equal(store.take(rows[rows >= 0]), self.expected[torch.from_numpy(rows >= 0)])

    def finished(self, folder: Path) -> None:
        self.check(folder)
        assert torch.equal(Store.open(folder / "store").vectors(self.texts), self.expected)
        nothing_unfinished(folder)
        assert not (folder / "store" / "job.safetensors").exists()


class Training:
    """Some steps of a run that saves at each, resumed if it was begun."""

    def __init__(self, model: Path, folder: Path):
        self.options = {"model": model, "store": folder / "vectors", "count": 12, "kind": "static", "batch_size": 4}
        self.options |= {"epochs": 1.0, "save_every": 1, "ema_decay": 0.5}
        whole = folder / "whole"
        run = partial(runs.small_run, output=whole / "run", keep_checkpoints=99, **self.options)
        # In a process of its own, as all that has a backward pass: PyTorch lets none run in a fork of one that had one.
        assert disturbed(run, folder).how == "done"
        self.digests, self.log = self._digests(whole), self._log(whole)

    def act(self, folder: Path) -> None:
        runs.small_run(output=folder / "run", resume=True, **self.options)

    def check(self, folder: Path) -> None:
        newest, damaged = checkpoint._newest_whole(folder / "run" / "checkpoints")
        assert damaged == []
        assert newest is None or self.digests[newest.name] == self._digest(newest)

    def finished(self, folder: Path) -> None:
        assert self._digests(folder) == {name: self.digests[name] for name in sorted(self.digests)[-2:]}
        assert self._log(folder) == self.log
        nothing_unfinished(folder / "run" / "checkpoints")

    def _digests(self, folder: Path) -> dict[str, str]:
        return {path.name: self._digest(path) for path in sorted((folder / "run" / "checkpoints").glob("step-*"))}

    @staticmethod
    def _log(folder: Path) -> list[dict[str, Any]]:
        return [{**line, "seconds": 0} for line in runlog.read(folder / "run" / runlog.NAME)]

    @staticmethod
    def _digest(path: Path) -> str:
        tensors = sorted(path.glob("*.safetensors"))
        return hashlib.sha256("".join(files.sha256(one) for one in tensors).encode()).hexdigest()


def scenes(model: Path, folder: Path) -> dict[str, Scene]:
    """All of them; those that need a model are prepared in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    export, embedding, training = Export(model, folder), Embedding(model, folder), Training(model, folder)
    nothing = partial(Path.mkdir, exist_ok=True)
    return {
        "store: rows are added": Scene(build_store, add_rows, check_store, finished_store),
        "store: made and filled": Scene(nothing, remake_store, check_made, finished_store),
        "store: a shard is taken out": Scene(build_two_shards, take_out_again, check_taken_out, finished_taken_out),
        "store: compressed": Scene(build_two_shards, small_store, check_compressed, finished_compressed),
        "checkpoint": Scene(build_checkpoints, partial(save_step, step=3), check_checkpoints, finished_checkpoints),
        "export and report": Scene(export.build, export.act, export.check, export.finished),
        "embed": Scene(nothing, embedding.act, embedding.check, embedding.finished),
        "train": Scene(nothing, training.act, training.check, training.finished),
    }


def fresh(build: Callable[[Path], object], folder: Path) -> Path:
    """A new copy of what a scene begins with."""
    base = folder.with_name(folder.name + "-base")
    if not base.exists():
        base.mkdir(parents=True)
        assert disturbed(partial(build, base), base).how == "done"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(base, folder)
    return folder
