"""A run that is compiled, recomputes its layers, or reads ahead is the run that does not."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
import torch
from torch import nn

from distill import students
from distill.encoder import Encoder
from distill.errors import RecipeError
from distill.training import TrainConfig, execution
from distill.verify_resume.comparing import compare


def layers_of(student: Encoder) -> nn.ModuleList:
    return execution.layers(student)


def losses(run: Any) -> list[float]:
    return [json.loads(line)["loss"] for line in (run.output / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("model", ["tiny_bert", "tiny_mpnet", "tiny_qwen"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_recomputed_layers_give_the_same_gradient(model: str, dropout: float, request: pytest.FixtureRequest) -> None:
    teacher = runs.teacher(request.getfixturevalue(model))
    student = runs.student("layers", teacher, dropout).train(dropout > 0)
    tokens = student.tokenize(runs.texts(12)).tokens
    found = {}
    for name, asked in (("plain", False), ("recomputed", True)):
        kept: list[int] = []

        def keep(tensor: torch.Tensor, kept: list[int] = kept) -> torch.Tensor:
            kept.append(tensor.nbytes)
            return tensor

        torch.manual_seed(3)
        config = TrainConfig(gradient_checkpointing=asked, dropout=dropout > 0)
        with execution.as_asked(student, config):
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                value = student(tokens).square().cumsum(dim=1).mean()
            value.backward()
        gradients = {key: p.grad.clone() for key, p in student.named_parameters() if p.grad is not None}
        student.zero_grad()
        found[name] = gradients, sum(kept)
    assert found["plain"][0].keys() == found["recomputed"][0].keys()
    for key, gradient in found["plain"][0].items():
        assert torch.equal(gradient, found["recomputed"][0][key]), key
    assert found["recomputed"][1] < found["plain"][1] / 2
    assert not any("forward" in vars(layer) for layer in layers_of(student))


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_checkpointing": True, "dropout": 0.1},
        {"gradient_checkpointing": True, "micro_batch": 3},
        {"read_ahead": True},
    ],
    ids=["dropout", "micro-batches", "read ahead"],
)
def test_a_run_is_the_same_bit_for_bit(changes: dict[str, Any], tiny_bert: Path, tmp_path: Path) -> None:
    common: dict[str, Any] = {"store": tmp_path / "store", "steps": 7, "bank_size": 16, "accumulation": 2}
    common |= {name: changes[name] for name in ("dropout", "micro_batch") if name in changes}
    plain = runs.small_run(tiny_bert, tmp_path / "plain", **common)
    other = runs.small_run(tiny_bert, tmp_path / "other", **common | changes)
    compare(plain.output, other.output)
    for name, value in runs.weights(plain).items():
        assert np.array_equal(value, runs.weights(other)[name]), name


def test_reading_ahead_goes_on_where_a_run_stopped(tiny_bert: Path, tmp_path: Path) -> None:
    common: dict[str, Any] = {
        "store": tmp_path / "store",
        "kind": "static",
        "bank_size": 16,
        "steps": 9,
        "save_every": 4,
    }
    whole = runs.small_run(tiny_bert, tmp_path / "whole", **common)
    threads = threading.active_count()
    runs.small_run(tiny_bert, tmp_path / "cut", **common, read_ahead=True)
    last = tmp_path / "cut" / "checkpoints" / "step-00000009"
    for path in last.iterdir():
        path.unlink()
    last.rmdir()
    again = runs.small_run(tiny_bert, tmp_path / "cut", **common, read_ahead=True, resume=True)
    assert threading.active_count() <= threads
    compare(whole.output, again.output)


def test_an_error_while_reading_ahead_ends_the_run(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: Any) -> Any:
        raise OSError("the disk is gone")

    monkeypatch.setattr("distill.store.Store.take_stored", gone)
    with pytest.raises(OSError, match="the disk is gone"):
        runs.small_run(tiny_bert, tmp_path / "run", store=tmp_path / "store", steps=3, read_ahead=True)


@pytest.mark.parametrize("flag", ["compile", "gradient_checkpointing"])
def test_a_static_student_has_no_layers_to_run_otherwise(flag: str, tiny_bert: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=f"--train.{flag.replace('_', '-')} is for a transformer"):
        runs.small_run(tiny_bert, tmp_path / "run", store=tmp_path / "store", kind="static", steps=2, **{flag: True})


def test_shared_layers_are_not_run_again(tiny_model: Callable[..., Path]) -> None:
    student = students.pretrained(runs.teacher(tiny_model("albert")), runs.teacher(tiny_model("albert")))
    with (
        pytest.raises(RecipeError, match=r"--train.gradient-checkpointing runs(.|\n)*Use --train.micro-batch"),
        execution.as_asked(student, TrainConfig(gradient_checkpointing=True)),
    ):
        pass


@pytest.mark.gpu
def test_a_gpu_is_fed_ahead_from_pinned_memory(tiny_bert: Path, tmp_path: Path) -> None:
    common: dict[str, Any] = {"store": tmp_path / "store", "steps": 7, "bank_size": 16}
    fed = runs.small_run(tiny_bert, tmp_path / "fed", **common)
    plain = runs.small_run(tiny_bert, tmp_path / "plain", **common, read_ahead=False)
    assert losses(fed) == pytest.approx(losses(plain), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_a_compiled_run_is_the_plain_one_in_few_programs(
    gradient_checkpointing: bool, tiny_mpnet: Path, tmp_path: Path
) -> None:
    from torch._dynamo.utils import counters

    common: dict[str, Any] = {"store": tmp_path / "store", "count": 60, "steps": 12, "batch_size": 16}
    plain = runs.small_run(tiny_mpnet, tmp_path / "plain", **common)
    torch._dynamo.reset()
    counters.clear()
    options = {"compile": True, "gradient_checkpointing": gradient_checkpointing}
    compiled = runs.small_run(tiny_mpnet, tmp_path / "compiled", **common, **options)
    assert 0 < counters["stats"]["unique_graphs"] <= 12  # of 12 batches, each of other lengths
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-4)
    assert not any("_orig_mod" in name for name in compiled.student.state_dict())
    assert compiled.student.backbone.model._compiled_call_impl is None  # type: ignore[union-attr]
