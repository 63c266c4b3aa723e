"""Checkpoints that are whole or absent: a folder a step, its manifest of hashes inside, renamed into place by one process.

OUTPUT/checkpoints/step-00000120/
    model.safetensors  optimizer.safetensors  rng.safetensors  state.json  manifest.json
"""

import json
import re
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from distill import distributed, files
from distill.errors import IntegrityError, ResourceError

_NAME = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class Checkpoint:
    """What was restored: the step, and the state that `save` was given."""

    step: int
    state: dict[str, Any]


def save(folder: Path, step: int, model: nn.Module, optimizer: Optimizer, state: dict[str, Any], *, keep: int) -> None:
    """Write `folder`/step-N from all processes' states; then, and only then, delete all but the newest `keep`.

    The main process writes: model and optimizer are the same everywhere under DDP, random states come from each process.
    """
    states = distributed.gather_objects(_random_state())
    distributed.main_first(partial(_write, folder, step, model, optimizer, state, states, keep))


def load_latest(folder: Path, model: nn.Module, optimizer: Optimizer, *, device: torch.device) -> Checkpoint | None:
    """Restore the newest whole checkpoint in place; None if there is none. A damaged one is named and passed over.

    IntegrityError if there are checkpoints and none is whole, or the weights do not fit the model.
    """
    paths = _steps(folder)
    found, damaged = None, []
    for path in reversed(paths):
        problem = distributed.main_first(partial(_problem, path))
        if problem is None:
            found = path
            break
        damaged.append(f"{path}: {problem}")
    if found is None:
        if damaged:
            raise IntegrityError("no checkpoint is whole:\n  " + "\n  ".join(damaged) + "\nStart without --resume.")
        return None
    for line in damaged if distributed.is_main() else []:
        print(f"passed over {line}")
    return _restore(found, model, optimizer, device)


def clear(folder: Path) -> None:
    """Delete the checkpoints of an earlier run."""
    for path in _steps(folder):
        shutil.rmtree(path)


def _steps(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if _NAME.fullmatch(path.name))


def _write(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: Optimizer,
    state: dict[str, Any],
    random: list[dict[str, Tensor]],
    keep: int,
) -> None:
    tensors = {
        "model": {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()},
        "optimizer": _optimizer_tensors(model, optimizer),
        "rng": {f"{rank}.{name}": value for rank, values in enumerate(random) for name, value in values.items()},
    }
    try:
        with files.published_folder(folder / f"step-{step:08d}") as temporary:
            for name, values in tensors.items():
                save_file(values, temporary / f"{name}.safetensors")
            (temporary / "state.json").write_text(json.dumps({"step": step, **state}), encoding="utf-8")
            hashes = {path.name: files.sha256(path) for path in sorted(temporary.iterdir())}
            (temporary / "manifest.json").write_text(json.dumps(hashes), encoding="utf-8")
    except OSError as error:
        raise ResourceError(
            f"the checkpoint of step {step} cannot be written under {folder}: {error}. Earlier ones are untouched."
        ) from error
    for old in _steps(folder)[:-keep]:
        shutil.rmtree(old)


def _problem(path: Path) -> str | None:
    try:
        hashes = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        wrong = [name for name, digest in hashes.items() if files.sha256(path / name) != digest]
    except (OSError, ValueError, AttributeError) as error:
        return str(error)
    return f"{', '.join(wrong)} differ from the manifest" if wrong else None


def _restore(path: Path, model: nn.Module, optimizer: Optimizer, device: torch.device) -> Checkpoint:
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    try:
        model.load_state_dict(load_file(path / "model.safetensors", device=str(device)))
    except RuntimeError as error:
        raise IntegrityError(f"{path} holds another model: {error}. Resume with the same student.") from error
    _restore_optimizer(load_file(path / "optimizer.safetensors"), model, optimizer)
    _restore_random(load_file(path / "rng.safetensors"))
    return Checkpoint(state.pop("step"), state)


def _parameter_names(model: nn.Module) -> dict[int, str]:
    return {id(parameter): name for name, parameter in model.named_parameters()}


def _optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    names = _parameter_names(model)
    return {
        f"{names[id(parameter)]}/{key}": value.detach().cpu().contiguous()
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
    }


def _restore_optimizer(tensors: dict[str, Tensor], model: nn.Module, optimizer: Optimizer) -> None:
    parameters = dict(model.named_parameters())
    for name, value in tensors.items():
        parameter, _, key = name.rpartition("/")
        # AdamW keeps its step counter on the CPU unless it is fused or capturable on a GPU; it moves it itself.
        on = parameters[parameter].device if value.ndim or parameters[parameter].is_cuda else value.device
        optimizer.state[parameters[parameter]][key] = value.to(on)


def _random_state() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    return states | {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else states


def _restore_random(states: dict[str, Tensor]) -> None:
    rank = distributed.rank()
    if f"{rank}.cpu" in states:  # a run on more processes than before has no earlier state for the new ones
        torch.set_rng_state(states[f"{rank}.cpu"])
    if f"{rank}.cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states[f"{rank}.cuda"])
