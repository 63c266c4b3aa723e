"""A table updated by rows against torch's AdamW on the whole table: the same trajectory, whatever rows wait for how long."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import processes
import pytest
import runs
import torch
from torch import Tensor

from distill.errors import IntegrityError, RecipeError
from distill.modules import StaticTable, Tokens
from distill.training import TrainConfig, optimizer, table_rows
from distill.training.averaging import WeightAverage
from distill.training.table_rows import TableRows

VOCABULARY, WIDTH = 40, 6


def used(step: int) -> Tensor:
    """Tokens of a step's texts: 0 always, few of the others, by chance; the last one never."""
    draw = torch.Generator().manual_seed(step)
    return torch.cat([torch.zeros(2), torch.randint(1, VOCABULARY - 1, (5,), generator=draw)]).int()


def rate(step: int, steps: int) -> float:
    """A warm-up and a fall to 0."""
    return 1e-2 * min((step + 1) / 10, (steps - 1 - step) / steps)


def loss(table: StaticTable, step: int, size: float) -> Tensor:
    draw = torch.Generator().manual_seed(1000 + step)
    tokens = Tokens(used(step), torch.tensor([3, 4], dtype=torch.int32))
    return size * (table(tokens) - torch.randn(2, WIDTH, generator=draw, dtype=torch.float64)).square().sum()


def dense(start: Tensor, steps: int, size: float, decay: float) -> tuple[Tensor, Tensor]:
    """Table and average as AdamW and WeightAverage leave them."""
    module = StaticTable(start).double()
    adamw = torch.optim.AdamW([module.table], weight_decay=decay)
    average = WeightAverage(module, 0.95)
    for step in range(steps):
        adamw.param_groups[0]["lr"] = rate(step, steps)
        adamw.zero_grad()
        loss(module, step, size).backward()
        adamw.step()
        average.update(step)
    return module.table.detach(), average.tensors["table"]


def by_rows(start: Tensor, steps: int, size: float, decay: float) -> tuple[Tensor, Tensor]:
    module = StaticTable(start).double()
    average = WeightAverage(module, 0.95)
    group = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": decay, "peak": 1.0}
    rows = TableRows(module, group, average.hand_over(module.table))
    for step in range(steps):
        rows.lend(step, used(step))
        loss(module, step, size).backward()
        rows.update(step, rate(step, steps), average.share(step))
    rows.finish(steps)
    return module.table.detach(), average.tensors["table"]


@pytest.mark.parametrize(("window", "decay"), [(7, 0.5), (1024, 0.0)])
@pytest.mark.parametrize(("size", "limit"), [(1.0, 1e-7), (1e-6, 2e-3), (1e-12, 1e-7)])
def test_the_table_and_its_average_end_where_adamw_takes_them(
    monkeypatch: pytest.MonkeyPatch, window: int, decay: float, size: float, limit: float
) -> None:
    """To 2e-3 of the way where eps (1e-8) counts as much as the gradients' roots do, 1e-7 where it counts little or is all."""
    monkeypatch.setattr(table_rows, "WINDOW", window)
    start = torch.randn(VOCABULARY, WIDTH)
    for found, expected in zip(by_rows(start, 120, size, decay), dense(start, 120, size, decay), strict=True):
        assert (found - expected).abs().max() <= limit * (expected - start).abs().max()


def test_a_row_that_waits_is_not_written() -> None:
    module = StaticTable(torch.randn(VOCABULARY, WIDTH)).double()
    group = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1, "peak": 1.0}
    rows, start = TableRows(module, group), module.table.detach().clone()
    rows.lend(0, used(0))
    loss(module, 0, 1.0).backward()
    assert module.table.grad is None
    assert module.lent is not None
    assert module.lent.grad is not None
    assert len(module.lent.grad) == len(used(0).unique())
    with pytest.raises(RuntimeError, match="found idx to be -1"):
        module(Tokens(torch.tensor([VOCABULARY - 1], dtype=torch.int32), torch.tensor([1], dtype=torch.int32)))
    rows.update(0, 0.1)
    moved = (module.table != start).any(dim=1)
    assert moved.nonzero().ravel().tolist() == used(0).unique().tolist()
    rows.finish(1)
    assert (module.table[-1] / start[-1]).tolist() == pytest.approx([0.99] * WIDTH)


# In a run

RUN: dict[str, Any] = {"kind": "static", "epochs": 4.0, "save_every": 3, "keep_checkpoints": 20, "bank_size": 16}


@pytest.fixture(scope="module")
def store(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "store"
    runs.prepared(tiny_bert, path, 40)
    return path


def weights_and_losses(model: Path, output: Path, **options: Any) -> tuple[dict[str, np.ndarray], list[float]]:
    run = runs.small_run(model, output, **RUN | options)
    assert all(value.requires_grad for value in run.student.parameters())
    return runs.weights(run), [json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "options",
    [{}, {"ema_decay": 0.8, "clip_norm": 0.01, "table_rate": 3.0}, {"micro_batch": 3, "accumulation": 2}],
    ids=str,
)
def test_a_run_by_rows_is_the_dense_run(
    tiny_bert: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """Without eps, of which the test above has the error, and without rounding: Adam makes up steps out of it."""
    monkeypatch.setattr(table_rows, "WINDOW", 8)
    monkeypatch.setattr("torch.optim.AdamW", partial(torch.optim.AdamW, eps=1e-20))
    options = {"store": store, "learning_rate": 1e-2, "dtype": torch.float64, **options}
    dense, dense_losses = weights_and_losses(tiny_bert, tmp_path / "dense", **options)
    rows, losses = weights_and_losses(tiny_bert, tmp_path / "rows", table_update="rows", **options)
    assert rows.keys() == dense.keys()
    np.testing.assert_allclose(losses, dense_losses, rtol=1e-9)
    for name, value in rows.items():
        np.testing.assert_allclose(value, dense[name], rtol=0, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("step", [3, 9])
def test_a_run_by_rows_resumed_differs_in_no_bit(
    tiny_bert: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    monkeypatch.setattr(table_rows, "WINDOW", 8)
    options = {"store": store, "table_update": "rows", "ema_decay": 0.8}
    whole, losses = weights_and_losses(tiny_bert, tmp_path, **options)
    for folder in (tmp_path / "checkpoints").iterdir():
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)
    again, theirs = weights_and_losses(tiny_bert, tmp_path, resume=True, **options, save_every=1)
    assert losses == theirs
    assert all((again[name] == value).all() for name, value in whole.items())
    with pytest.raises(IntegrityError, match=r"what differs: table_update \(was rows, is None\)"):
        weights_and_losses(tiny_bert, tmp_path, resume=True, store=store, ema_decay=0.8)


def in_one_of_two(model: str, store: str, output: str) -> dict[str, list[float]]:
    run = runs.small_run(model, output, store=store, **UNEVEN)
    return {name: value.ravel().tolist() for name, value in runs.weights(run).items()}


UNEVEN: dict[str, Any] = RUN | {"table_update": "rows", "ema_decay": 0.8, "count": 13}  # a last batch of 5


def test_two_processes_move_the_rows_that_one_moves(tiny_bert: Path, store: Path, tmp_path: Path) -> None:
    first, second = processes.run(in_one_of_two, 2, tmp_path, model=tiny_bert, store=store, output=tmp_path / "two")
    assert first == second
    alone = runs.weights(runs.small_run(tiny_bert, tmp_path / "one", store=store, **UNEVEN))
    for name, value in alone.items():
        np.testing.assert_allclose(value.ravel(), first[name], atol=5e-5, err_msg=name)


def test_what_has_no_table_to_update_is_refused(tiny_bert: Path) -> None:
    student, config = runs.student("layers", runs.teacher(tiny_bert)), TrainConfig(table_update="rows")
    with pytest.raises(RecipeError, match=r"--train.table-update rows is for a static table"):
        optimizer.rows_of(student, optimizer.adamw(student, config), config, None)
    with pytest.raises(RecipeError, match="start_decay pulls every row"):
        TrainConfig(table_update="rows", start_decay=1.0)
