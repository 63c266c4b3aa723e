"""Checkpoints that are whole or absent: a folder a step, its manifest of hashes inside, renamed into place by one process.

OUTPUT/checkpoints/step-00000120/
    model.safetensors  optimizer.safetensors  rng.safetensors  state.json  manifest.json
    average.safetensors, start.safetensors: what a run keeps beside its weights, if it keeps any
OUTPUT/checkpoints/recipe.json: what they were begun with, once another recipe was started there
"""

import json
import re
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
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

_NAME = re.compile(r"step-(\d{8,})")
RECIPE = "recipe.json"
_FILES = {"model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json"}

Further = Mapping[str, Mapping[str, Tensor]]  # tensors beside the model's, by file and name


@dataclass(frozen=True)
class Checkpoint:
    """What was restored: the step, and the state that `save` was given."""

    step: int
    state: dict[str, Any]


def save(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: Optimizer,
    state: dict[str, Any],
    *,
    keep: int,
    further: Further | None = None,
) -> None:
    """Write `folder`/step-N from all processes' states; then, and only then, delete all but the newest `keep`.

    The main process writes: model, optimizer and `further` are the same everywhere under DDP, random states come from each
    process. `further` = {"average": {"weight": tensor}} becomes average.safetensors.
    """
    states = distributed.gather_objects(_random_state(model))
    tensors = {
        "model": model.state_dict(),
        "optimizer": _optimizer_tensors(model, optimizer),
        "rng": {f"{rank}.{name}": value for rank, values in enumerate(states) for name, value in values.items()},
        **(further or {}),
    }
    distributed.main_first(partial(_write, folder, step, tensors, state, keep))


def load_latest(
    folder: Path,
    model: nn.Module,
    optimizer: Optimizer,
    *,
    accept: Callable[[dict[str, Any]], None] | None = None,
    further: Further | None = None,
) -> Checkpoint | None:
    """Restore the newest whole checkpoint in place; None if there is none. A damaged one is named and passed over.

    `accept` sees the saved state before anything is restored, and may raise. IntegrityError if there are checkpoints
    and none is whole, or the weights do not fit the model, or one of `further` was not saved.
    """
    found, damaged = distributed.main_first(partial(_newest_whole, folder))
    if found is None:
        if damaged:
            raise IntegrityError(
                "no checkpoint is whole:\n  " + "\n  ".join(damaged) + "\nStart without --train.resume."
            )
        return None
    for line in damaged if distributed.is_main() else []:
        print(f"passed over {line}", file=sys.stderr)
    state = json.loads((found / "state.json").read_text(encoding="utf-8"))
    if accept:
        accept(state)
    _restore(found, model, optimizer)
    _restore_further(found, further or {})
    return Checkpoint(state.pop("step"), state)


def tidy(folder: Path, step: int, keep: int) -> None:
    """Delete what the save of this step would have, had it not been killed behind its last write; what cannot be deleted stays.

    Later checkpoints were passed over as damaged, and stay until a new one is whole.
    """
    with suppress(OSError):
        files.remove_unfinished(folder, "step-*")
        for path in _outdated(folder, step, keep):
            files.remove_folder(path)


def clear(folder: Path) -> None:
    """Delete the checkpoints of an earlier run, and the recipe it was begun with."""
    for path in _steps(folder):
        files.remove_folder(path)
    files.remove_unfinished(folder, "step-*")
    if (folder / RECIPE).exists():
        (folder / RECIPE).unlink()


def _steps(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("step-*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=_step)


def _outdated(folder: Path, step: int, keep: int) -> list[Path]:
    """The checkpoints up to a step, but for the newest `keep`."""
    return [path for path in _steps(folder) if _step(path) <= step][:-keep]


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _newest_whole(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint, and what is wrong with each that is newer."""
    damaged: list[str] = []
    for path in reversed(_steps(folder)):
        problem = _problem(path)
        if problem is None:
            return path, damaged
        damaged.append(f"{path}: {problem}")
    return None, damaged


def _write(folder: Path, step: int, tensors: Further, state: dict[str, Any], keep: int) -> None:
    try:
        files.remove_unfinished(folder, "step-*")
        with files.published_folder(folder / f"step-{step:08d}") as temporary:
            for name, values in tensors.items():
                save_file(_on_disk(values), temporary / f"{name}.safetensors")
            (temporary / "state.json").write_text(json.dumps({"step": step, **state}), encoding="utf-8")
            hashes = {path.name: files.sha256(path) for path in sorted(temporary.iterdir())}
            (temporary / "manifest.json").write_text(json.dumps(hashes), encoding="utf-8")
    except OSError as error:
        raise ResourceError(
            f"the checkpoint of step {step} cannot be written under {folder}: {error}. Earlier ones are untouched."
        ) from error
    _remove_old(folder, step, keep)


def _remove_old(folder: Path, step: int, keep: int) -> None:
    """All but the newest `keep`. A later step than the one just written is a damaged one that the run went back behind."""
    for path in [*_outdated(folder, step, keep), *(path for path in _steps(folder) if _step(path) > step)]:
        files.remove_folder(path)


def _on_disk(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As safetensors takes them: on the CPU, contiguous, and none the same memory as another (tied weights)."""
    result: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in tensors.items():
        value = value.detach().cpu().contiguous()
        result[name] = value.clone() if value.data_ptr() in seen else value
        seen.add(value.data_ptr())
    return result


def _problem(path: Path) -> str | None:
    try:
        hashes = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        missing = sorted(_FILES - set(hashes))
        wrong = [name for name in sorted(hashes) if not missing and files.sha256(path / name) != hashes[name]]
    except (OSError, ValueError, TypeError, RecursionError) as error:
        return str(error)
    if missing:
        return f"its manifest does not name {', '.join(missing)}"
    return f"{', '.join(wrong)} differ from the manifest" if wrong else None


def _restore(path: Path, model: nn.Module, optimizer: Optimizer) -> None:
    try:
        model.load_state_dict(load_file(path / "model.safetensors"))
    except RuntimeError as error:
        raise IntegrityError(f"{path} holds another model: {error}. Resume with the same student.") from error
    _restore_optimizer(load_file(path / "optimizer.safetensors"), model, optimizer)
    _restore_random(load_file(path / "rng.safetensors"), model)


@torch.no_grad()
def _restore_further(path: Path, further: Further) -> None:
    for file, tensors in further.items():
        try:
            saved = load_file(path / f"{file}.safetensors")
            for name, value in tensors.items():
                value.copy_(saved[name])
        except (FileNotFoundError, KeyError, RuntimeError) as error:
            raise IntegrityError(
                f"{path} holds no {file} of this model: {error}. Resume with the same recipe."
            ) from error


def _parameter_names(model: nn.Module) -> dict[int, str]:
    return {id(parameter): name for name, parameter in model.named_parameters()}


def _optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    names = _parameter_names(model)
    return {
        f"{names[id(parameter)]}/{key}": value
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


def _random_state(model: nn.Module) -> dict[str, Tensor]:
    """Of the devices that the model runs on: to ask a GPU that it does not use would take memory there."""
    states = {"cpu": torch.get_rng_state()}
    return states | {"cuda": torch.cuda.get_rng_state()} if _on_cuda(model) else states


def _restore_random(states: dict[str, Tensor], model: nn.Module) -> None:
    rank = distributed.rank()
    if f"{rank}.cpu" in states:  # a run on more processes than before has no earlier state for the new ones
        torch.set_rng_state(states[f"{rank}.cpu"])
    if f"{rank}.cuda" in states and _on_cuda(model):
        torch.cuda.set_rng_state(states[f"{rank}.cuda"])


def _on_cuda(model: nn.Module) -> bool:
    return any(parameter.is_cuda for parameter in model.parameters())
