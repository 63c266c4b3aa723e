"""A store that was damaged anywhere: `verify` names the shard, `repair` takes out that one alone, and the next embed() mends it."""

import json
import os
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import counts
import numpy as np
import processes
import pytest
import runs
import torch

from distill.embed import embed, job
from distill.errors import IntegrityError
from distill.modules import Tokens
from distill.store import Store, text_keys, verify
from distill.store.__main__ import main

TEXTS = runs.texts(90)


@pytest.fixture(scope="module")
def whole(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of three shards."""
    path = tmp_path_factory.mktemp("corruption") / "store"
    for start in (0, 30, 60):
        embed(TEXTS[start : start + 30], runs.teacher(tiny_bert), path)
    assert [shard.rows for shard in Store.open(path).shards] == [30, 30, 30]
    return path


def damages(raw: bytes, flips: int, step: int) -> Iterator[tuple[str, bytes]]:
    """Every byte of the header flipped, `flips` random bits, truncation at every `step`-th byte."""
    end = 8 + struct.unpack("<Q", raw[:8])[0]
    draw = np.random.default_rng(0)
    for place in range(0, end, max(1, 2000 // flips)):
        yield "header bytes flipped", raw[:place] + bytes([raw[place] ^ 0xFF]) + raw[place + 1 :]
    for _ in range(flips):
        place, bit = int(draw.integers(len(raw))), 1 << int(draw.integers(8))
        yield "random bits flipped", raw[:place] + bytes([raw[place] ^ bit]) + raw[place + 1 :]
    for length in range(0, len(raw), step):
        yield "truncations", raw[:length]


def test_every_damage_is_named_and_only_that_shard(whole: Path, tmp_path: Path, full: bool) -> None:
    path = shutil.copytree(whole, tmp_path / "store")
    shard = path / Store.open(path).shards[1].file
    raw, expected = shard.read_bytes(), Store.open(path).vectors(TEXTS)
    done: dict[str, list[int]] = {}
    for kind, content in damages(raw, counts.amount("flips", full), counts.amount("truncation", full)):
        shard.write_bytes(content)
        named = list(verify(path)) == [shard.name]
        try:
            read = Store.open(path)
            read.take(np.arange(len(read)))
        except IntegrityError as error:
            named = named and shard.name in str(error)
        done.setdefault(kind, []).append(named)
    shard.write_bytes(raw)
    assert torch.equal(Store.open(path).vectors(TEXTS), expected)
    for kind, all_named in done.items():
        counts.note(5, f"store: {kind}", len(all_named), all_named.count(False))
        assert all(all_named)


def test_repair_and_embed_compute_the_damaged_shard_alone(
    whole: Path, tiny_bert: Path, tmp_path: Path, full: bool, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    expected, teacher, computed = Store.open(whole).vectors(TEXTS), runs.teacher(tiny_bert), []
    compute = teacher.compute

    def counting(tokens: Tokens) -> torch.Tensor:
        computed.append(len(tokens))
        return compute(tokens)

    monkeypatch.setattr(teacher, "compute", counting)
    trials = list(damages((whole / Store.open(whole).shards[1].file).read_bytes(), 4, 4096))[:: 1 if full else 40]
    for number, (_, content) in enumerate(trials):
        path = shutil.copytree(whole, tmp_path / f"store-{number}")
        shard = Store.open(path).shards[number % 3].file
        (path / shard).write_bytes(content)
        assert main(["verify", str(path)]) == 4
        assert main(["repair", str(path)]) == 0
        assert "1 damaged shards taken out" in capsys.readouterr().out
        assert main(["verify", str(path)]) == 0
        computed.clear()
        embed(TEXTS, teacher, path)
        assert sum(computed) == 30
        assert torch.equal(Store.open(path).vectors(TEXTS), expected)
    counts.note(5, "stores repaired, only the damaged shard computed anew", len(trials))


# Eight at once


def build_all(model: str, path: str) -> dict[str, Any]:
    """In a process of its own, at the same time as others: all texts into one store."""
    job.WINDOW, job.BATCH_TOKENS = 32, 64
    teacher, computed = runs.teacher(model), 0
    compute = teacher.compute

    def counting(tokens: Tokens) -> torch.Tensor:
        nonlocal computed
        computed += len(tokens)
        return compute(tokens)

    teacher.compute = counting  # type: ignore[method-assign]
    embed(TEXTS, teacher, Path(path), flush_seconds=0.05)
    return {"computed": computed}


def builds(model: str, folder: str) -> list[list[int]]:
    """In a process of its own: a store built by eight at once, and one by one."""
    return [build_forked(model, f"{folder}/eight", 8), build_forked(model, f"{folder}/serial", 1)]


def build_forked(model: str, path: str, writers: int) -> list[int]:
    """Writers as forks of one process, so that they begin together; how many texts each computed."""
    pipes = []
    for _ in range(writers):
        reading, writing = os.pipe()
        if os.fork() == 0:
            try:
                os.write(writing, json.dumps(build_all(model, path)).encode())
            finally:
                os._exit(0)
        os.close(writing)
        pipes.append(reading)
    return [json.loads(os.fdopen(reading).read())["computed"] for reading in pipes]


def test_eight_writers_compute_each_text_once(tiny_bert: Path, tmp_path: Path) -> None:
    path = tmp_path / "eight"
    [(computed, serial)] = processes.run(builds, 1, tmp_path, model=tiny_bert, folder=tmp_path)
    assert sum(computed) == len(TEXTS) == sum(serial)
    store = Store.open(path)
    assert len(store) == len(TEXTS) == len({bytes(key) for key in text_keys(TEXTS)})
    assert verify(path) == {}
    assert store.orphans() == []
    assert torch.equal(store.vectors(TEXTS), Store.open(tmp_path / "serial").vectors(TEXTS))
    counts.note(8, "writers of one store, each text computed once, the serial bits", 8)
