"""Checkpoints are whole or passed over, by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim import AdamW

from distill.errors import IntegrityError, ResourceError
from distill.training import checkpoint


def parts(width: int = 4) -> tuple[nn.Module, AdamW]:
    model = nn.Sequential(nn.Linear(width, width), nn.Dropout(0.5), nn.Linear(width, 1))
    return model, AdamW(model.parameters(), lr=0.1, fused=True)


def advance(model: nn.Module, optimizer: AdamW, steps: int = 1) -> None:
    for _ in range(steps):
        model(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def write(folder: Path, *steps: int, keep: int = 10) -> tuple[nn.Module, AdamW]:
    model, optimizer = parts()
    for step in steps:
        advance(model, optimizer)
        checkpoint.save(folder, step, model, optimizer, {"note": f"at {step}"}, keep=keep)
    return model, optimizer


def load(folder: Path, **options: Any) -> checkpoint.Checkpoint | None:
    model, optimizer = parts()
    return checkpoint.load_latest(folder, model, optimizer, **options)


def names(folder: Path) -> list[str]:
    return sorted(item.name for item in folder.iterdir())


def test_everything_comes_back_bitwise(tmp_path: Path) -> None:
    model, optimizer = write(tmp_path, 1, 2)
    advance(model, optimizer, 3)
    other, its_optimizer = parts()
    found = checkpoint.load_latest(tmp_path, other, its_optimizer)
    assert found == checkpoint.Checkpoint(2, {"note": "at 2"})
    advance(other, its_optimizer, 3)
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert optimizer.state[mine].keys() == its_optimizer.state[theirs].keys() == {"step", "exp_avg", "exp_avg_sq"}
        for key, value in optimizer.state[mine].items():
            assert torch.equal(its_optimizer.state[theirs][key], value)


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert load(tmp_path / "nothing") is None
    (tmp_path / "step-1").mkdir()
    (tmp_path / "step-00000002").write_text("a file")
    assert load(tmp_path) is None


def test_a_model_on_the_cpu_leaves_a_gpu_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = write(tmp_path, 1)  # a step of AdamW asks a torch that was built for CUDA
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("get_rng_state", "set_rng_state"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: pytest.fail("asked a GPU"))
    checkpoint.save(tmp_path, 2, model, optimizer, {}, keep=1)
    assert load_file(tmp_path / "step-00000002" / "rng.safetensors").keys() == {"0.cpu"}
    checkpoint._restore_random({"0.cuda": torch.get_rng_state()}, model)  # of a run that was on one


def test_only_the_newest_stay_and_what_killed_writers_left_goes(tmp_path: Path) -> None:
    (tmp_path / ".step-00000003.abc_1234").mkdir()
    write(tmp_path, 1, 2, 99_999_999, 100_000_000, keep=2)
    assert names(tmp_path) == ["step-100000000", "step-99999999"]
    found = load(tmp_path)
    assert found is not None
    assert found.step == 100_000_000
    checkpoint.clear(tmp_path)
    assert names(tmp_path) == []


def _truncate(path: Path) -> None:
    (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:-1])


def _flip(path: Path) -> None:
    raw = bytearray((path / "optimizer.safetensors").read_bytes())
    raw[-3] ^= 16
    (path / "optimizer.safetensors").write_bytes(raw)


def _missing(path: Path) -> None:
    (path / "rng.safetensors").unlink()


def _state(path: Path) -> None:
    (path / "state.json").write_text("{}")


def _manifest(content: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        (path / "manifest.json").write_text(content)

    return damage


DAMAGES = {
    "truncated": _truncate,
    "flipped": _flip,
    "missing": _missing,
    "state": _state,
    "no manifest": lambda path: (path / "manifest.json").unlink(),
    **{f"manifest {content[:8]}": _manifest(content) for content in ("", "{}", "[]", "null", "3", "[" * 100_000)},
    "manifest of one file": _manifest('{"state.json": "00"}'),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    tmp_path: Path, damage: Callable[[Path], None], capsys: pytest.CaptureFixture
) -> None:
    write(tmp_path, 1, 2)
    damage(tmp_path / "step-00000002")
    found = load(tmp_path)
    assert found is not None
    assert found.step == 1
    assert f"passed over {tmp_path / 'step-00000002'}" in capsys.readouterr().err
    damage(tmp_path / "step-00000001")
    with pytest.raises(IntegrityError, match=r"no checkpoint is whole:\n.*00000002.*\n.*00000001.*"):
        load(tmp_path)


@pytest.mark.parametrize("keep", [1, 2])
def test_a_damaged_later_checkpoint_does_not_outlive_a_whole_earlier_one(tmp_path: Path, keep: int) -> None:
    model, optimizer = write(tmp_path, 10, 20, 30)
    _flip(tmp_path / "step-00000030")
    checkpoint.save(tmp_path, 25, model, optimizer, {}, keep=keep)
    assert names(tmp_path) == ["step-00000020", "step-00000025"][-keep:]
    found = load(tmp_path)
    assert found is not None
    assert found.step == 25


def test_tidying_does_what_a_save_that_was_killed_had_still_to_do(tmp_path: Path) -> None:
    write(tmp_path, 1, 2, 3, 4)
    (tmp_path / ".step-00000003.abc_1234").mkdir()
    checkpoint.tidy(tmp_path, 3, keep=2)
    assert names(tmp_path) == ["step-00000002", "step-00000003", "step-00000004"]  # the last was passed over: it stays


def test_what_does_not_fit_is_refused_before_anything_is_changed(tmp_path: Path) -> None:
    write(tmp_path, 1)
    model, optimizer = parts()
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def refuse(state: dict[str, Any]) -> None:
        assert state == {"step": 1, "note": "at 1"}
        raise IntegrityError("another run")

    with pytest.raises(IntegrityError, match="another run"):
        checkpoint.load_latest(tmp_path, model, optimizer, accept=refuse)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    other, its_optimizer = parts(5)
    with pytest.raises(IntegrityError, match="holds another model"):
        checkpoint.load_latest(tmp_path, other, its_optimizer)


def test_tied_weights_can_be_saved(tmp_path: Path) -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    model["b"].weight = model["a"].weight
    optimizer = AdamW(model.parameters())
    checkpoint.save(tmp_path, 1, model, optimizer, {}, keep=1)
    saved = model["a"].weight.detach().clone()
    model["a"].weight.data.zero_()
    assert checkpoint.load_latest(tmp_path, model, optimizer) is not None
    assert torch.equal(model["b"].weight, saved)


def test_further_tensors_come_back_in_place_and_are_checked_like_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    model, optimizer = parts()
    average = {"weight": torch.randn(4, 4), "bias": torch.randn(4)}
    for step in (1, 2):
        advance(model, optimizer)
        checkpoint.save(tmp_path, step, model, optimizer, {}, keep=5, further={"average": average})
    held = {name: torch.zeros_like(value) for name, value in average.items()}
    assert checkpoint.load_latest(tmp_path, model, optimizer, further={"average": held}) is not None
    assert all(torch.equal(held[name], value) for name, value in average.items())
    (tmp_path / "step-00000002" / "average.safetensors").write_bytes(b"")
    found = checkpoint.load_latest(tmp_path, model, optimizer, further={"average": held})
    assert found is not None
    assert found.step == 1
    assert "average.safetensors differ from the manifest" in capsys.readouterr().err


@pytest.mark.parametrize(
    "asked", [{"start": {"weight": torch.zeros(4)}}, {"average": {"bias": torch.zeros(4)}}], ids=["file", "tensor"]
)
def test_further_tensors_that_were_not_saved_are_refused(tmp_path: Path, asked: dict[str, Any]) -> None:
    model, optimizer = parts()
    checkpoint.save(tmp_path, 1, model, optimizer, {}, keep=1, further={"average": {"weight": torch.zeros(4)}})
    with pytest.raises(IntegrityError, match=f"holds no {next(iter(asked))} of this model"):
        checkpoint.load_latest(tmp_path, model, optimizer, further=asked)


@pytest.mark.parametrize("call", ["fsync", "rename", "replace"])
@pytest.mark.parametrize("failing", range(6))
def test_a_save_that_fails_anywhere_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, failing: int
) -> None:
    import os

    model, optimizer = write(tmp_path, 1)
    original, calls = getattr(os, call), iter(range(100))

    def sometimes(*arguments: Any) -> None:
        if next(calls) == failing:
            raise OSError(28, "No space left on device")
        original(*arguments)

    with monkeypatch.context() as context:
        context.setattr(os, call, sometimes)
        try:
            checkpoint.save(tmp_path, 2, model, optimizer, {"note": "at 2"}, keep=2)
        except ResourceError as error:
            assert "No space left" in str(error)  # noqa: PT017
    found = load(tmp_path)
    assert found is not None
    assert found.state == {"note": f"at {found.step}"}
    assert [name for name in names(tmp_path) if name.startswith(".")] == []


def test_a_manifest_names_every_file(tmp_path: Path) -> None:
    write(tmp_path, 1)
    folder = tmp_path / "step-00000001"
    assert set(json.loads((folder / "manifest.json").read_text())) == {*names(folder)} - {"manifest.json"}
    shutil.copytree(folder, tmp_path / "step-00000007")
    found = load(tmp_path)
    assert found is not None
