"""A run resumed from any step is the run that was never stopped, bit for bit; on other numbers of processes it is the same run."""

import shutil
from pathlib import Path
from typing import Any

import counts
import numpy as np
import processes
import pytest
import runs
import torch

from distill import distributed, losses, runlog
from distill.verify_resume.comparing import compare

# Forty steps over two epochs; dropout, a bank, an average of the weights: all that has a state.
LONG: dict[str, Any] = {
    "count": 80,
    "batch_size": 4,
    "epochs": 2.0,
    "bank_size": 16,
    "loss": "sum",
    "dropout": 0.1,
    "ema_decay": 0.9,
    "save_every": 1,
    "keep_checkpoints": 50,
}
STEPS = 40


def cut_behind(source: Path, target: Path, step: int) -> None:
    """The run as it was when it had saved `step`, and had logged one more."""
    shutil.copytree(source, target)
    for folder in (target / "checkpoints").iterdir():
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)
    lines = (target / "metrics.jsonl").read_text().splitlines(keepends=True)
    (target / "metrics.jsonl").write_text("".join(lines[: step + 1]))


def resume_all(model: str, store: str, folder: str, steps: list[int]) -> list[str]:
    """In one of several processes: the whole run; from each of the steps on, and once more from a later one; what differs."""
    place, differing = Path(folder), []
    runs.small_run(model, place / "whole", store=store, **LONG)
    for step in steps:
        again = [step, step + (STEPS - step) // 2]
        for number, at in enumerate(again):
            source = place / "whole" if number == 0 else place / f"{step}-0"
            if distributed.is_main():
                cut_behind(source, place / f"{step}-{number}", at)
            torch.randn(distributed.rank() + 3)  # whatever happened before in this process
            distributed.agree(None)
            runs.small_run(model, place / f"{step}-{number}", store=store, resume=True, **LONG)
            problem = distributed.main_first(
                lambda there=place / f"{step}-{number}": difference(place / "whole", there)
            )
            differing += [f"from step {at}: {problem}"] if problem else []
        distributed.main_first(
            lambda step=step: [shutil.rmtree(place / f"{step}-{number}") for number in range(2)] and None
        )
    return differing


def difference(whole: Path, resumed: Path) -> str:
    try:
        compare(whole, resumed)
    except Exception as error:
        return str(error)
    return ""


@pytest.mark.parametrize("world", [1, 2])
def test_any_step_of_forty_can_be_resumed_twice(tiny_bert: Path, tmp_path: Path, world: int, full: bool) -> None:
    chosen = np.linspace(1, STEPS - 1, counts.amount("resumed steps", full)).round().astype(int).tolist()
    chosen = chosen if world == 1 or full else chosen[1:2]
    options = {"model": tiny_bert, "store": tmp_path / "store", "folder": tmp_path / "runs", "steps": chosen}
    found = processes.run(resume_all, world, tmp_path, timeout_seconds=10_000 if full else 800, **options)
    counts.note(2, f"resumed at a step of 40 and once more, {world} processes", len(chosen), len(found[0]))
    assert found == [[]] * world
    assert len(runlog.read(tmp_path / "runs" / "whole" / runlog.NAME)) == STEPS


# Elastic

ELASTIC: dict[str, Any] = {"count": 50, "batch_size": 7, "epochs": 4.0, "bank_size": 16, "loss": "sum"}
ELASTIC |= {"ema_decay": 0.9, "save_every": 8, "keep_checkpoints": 9, "learning_rate": 3e-4, "dtype": torch.float64}


def elastic(model: str, store: str, output: str, until: int | None) -> int:
    """In one of several processes: go on with the run, up to a checkpoint; all that is left if that is None."""
    run = runs.small_run(model, Path(output), store=store, resume=True, **ELASTIC)
    if until is not None and distributed.is_main():
        cut_behind(Path(output), Path(output).with_name("cut"), until)
        shutil.rmtree(output)
        shutil.move(Path(output).with_name("cut"), output)
    return run.steps


def test_a_run_goes_on_with_other_numbers_of_processes(tiny_bert: Path, tmp_path: Path) -> None:
    """1 -> 2 -> 3 -> 1 processes at one global batch, each from the checkpoint of the one before."""
    options = {"model": tiny_bert, "store": tmp_path / "store"}
    runs.small_run(tiny_bert, tmp_path / "alone", store=tmp_path / "store", **ELASTIC)
    for world, until in ((1, 8), (2, 16), (3, 24), (1, None)):
        processes.run(elastic, world, tmp_path, output=tmp_path / "elastic", until=until, **options)
    alone, many = (runlog.read(tmp_path / name / runlog.NAME) for name in ("alone", "elastic"))
    assert [line["step"] for line in many] == list(range(1, 33))
    assert [line["order"] for line in many] == [line["order"] for line in alone]
    assert [line["texts"] for line in many] == [line["texts"] for line in alone]
    np.testing.assert_allclose([line["loss"] for line in many], [line["loss"] for line in alone], rtol=1e-6, atol=1e-6)
    counts.note(3, "steps of 1 -> 2 -> 3 -> 1 processes, order equal, losses within 1e-6", len(many))


# Gradients of whole steps

STEP_LOSSES = {
    "cosine": losses.CosineDistance,
    "contrastive": losses.CrossContrastive,
    "kl": losses.CrossKL,
    "gram kl": losses.GramKL,
    "gram mse": losses.GramMSE,
    "rkd distance": losses.RKDDistance,
    "similarity preserving": losses.SimilarityPreserving,
    "cka": losses.CKA,
}
ACCUMULATIONS = (1, 4)


def first_norms(model: str, store: str, folder: str) -> dict[str, list[float]]:
    """In one of several processes: losses and gradient norms of two steps of each loss, 23 texts in batches of 9 (the last has 5)."""
    found = {}
    for name, make in STEP_LOSSES.items():
        runs.LOSSES[name] = make
        for accumulation in ACCUMULATIONS:
            for dtype in (torch.float32, torch.float64):
                output = Path(folder) / f"{name}-{accumulation}-{dtype}-{distributed.world_size()}"
                options = {"count": 23, "batch_size": 9, "steps": 3, "accumulation": accumulation, "bank_size": 8}
                runs.small_run(model, output, store=store, loss=name, kind="static", dtype=dtype, **options)
                key = f"{name}, accumulation {accumulation}, {str(dtype)[6:]}"
                found[key] = [
                    line[number] for line in runlog.read(output / runlog.NAME) for number in ("loss", "grad_norm")
                ]
    return found


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)])
def test_steps_of_any_number_of_processes_are_those_of_one(tiny_bert: Path, tmp_path: Path, world: int) -> None:
    options = {"model": tiny_bert, "store": tmp_path / "store", "folder": tmp_path}
    [alone] = processes.run(first_norms, 1, tmp_path, **options)
    many = processes.run(first_norms, world, tmp_path, timeout_seconds=900, **options)
    assert len(alone) == len(STEP_LOSSES) * len(ACCUMULATIONS) * 2
    for key, values in alone.items():
        limit = 1e-10 if key.endswith("float64") else 1e-5
        for one in many:
            np.testing.assert_allclose(one[key], values, rtol=limit, atol=limit, err_msg=key)
    counts.note(4, f"loss x accumulation x dtype, uneven last batch, {world} processes", len(alone))
