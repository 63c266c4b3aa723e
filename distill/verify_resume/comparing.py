"""Two run folders, bit for bit: what was logged, and everything of the last checkpoints."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from distill import runlog
from distill.errors import IntegrityError

UNEQUAL_BY_NATURE = {"seconds", "padding"}  # of what is logged: how a step was run, not what it did


def compare(whole: Path, other: Path) -> str:
    """What was compared and is equal, in words. IntegrityError names the first difference of two run folders."""
    steps = _compare_logs(whole, other)
    folders = [_newest(output) for output in (whole, other)]
    if folders[0].name != folders[1].name:
        raise IntegrityError(f"not equal: the last checkpoints are {folders[0].name} and {folders[1].name}.")
    counts = _compare_checkpoints(*folders)
    return f"{steps} logged steps (losses, rates, gradient norms, order of texts), " + ", ".join(
        f"{count} tensors of {name}" for name, count in counts.items()
    )


def _compare_logs(whole: Path, other: Path) -> int:
    left, right = (runlog.read(output / runlog.NAME) for output in (whole, other))
    for one, two in zip(left, right, strict=False):
        for name in dict.fromkeys([*one, *two]):
            if name not in UNEQUAL_BY_NATURE and repr(one.get(name)) != repr(two.get(name)):  # NaN is NaN
                raise IntegrityError(
                    f"not equal: {name} of step {one['step']} is {one.get(name)} undisturbed, {two.get(name)} resumed."
                )
    if len(left) != len(right):
        raise IntegrityError(f"not equal: {len(left)} steps are logged undisturbed, {len(right)} resumed.")
    return len(left)


def _newest(output: Path) -> Path:
    return output / "checkpoints" / f"step-{saved_steps(output)[-1]:08d}"


def _compare_checkpoints(left: Path, right: Path) -> dict[str, int]:
    """How many tensors of each file are equal."""
    names = [sorted(path.name for path in folder.glob("*.safetensors")) for folder in (left, right)]
    if names[0] != names[1]:
        raise IntegrityError(
            f"not equal: a checkpoint holds {', '.join(names[0])} undisturbed, {', '.join(names[1])} resumed."
        )
    counts = {}
    for name in names[0]:
        one, two = load_file(left / name), load_file(right / name)
        if one.keys() != two.keys():
            raise IntegrityError(f"not equal: {name} differs in {', '.join(sorted(one.keys() ^ two.keys()))}.")
        for key in sorted(one):
            _compare_tensors(f"{key} of {name}", one[key], two[key])
        counts[name.removesuffix(".safetensors")] = len(one)
    return counts


def _compare_tensors(name: str, one: Tensor, two: Tensor) -> None:
    if (one.shape, one.dtype) != (two.shape, two.dtype):
        raise IntegrityError(
            f"not equal: {name} is {one.dtype} {tuple(one.shape)}, and {two.dtype} {tuple(two.shape)}."
        )
    left, right = (part.contiguous().view(-1).view(torch.uint8) for part in (one, two))  # NaN is NaN, -0 is not 0
    if not torch.equal(left, right):
        place = int(torch.nonzero(left != right)[0]) // one.element_size()
        raise IntegrityError(
            f"not equal: {name} at [{place}] of {one.numel():,} is {one.view(-1)[place].item()!r} undisturbed, "
            f"{two.view(-1)[place].item()!r} resumed."
        )


def saved_steps(output: Path) -> list[int]:
    """Steps of the checkpoints there are; a folder of that name is a whole one."""
    return sorted(int(path.name.removeprefix("step-")) for path in (output / "checkpoints").glob("step-*"))


def last_logged(output: Path) -> int:
    """The last step that is logged, 0 if none is."""
    lines = runlog.read(output / runlog.NAME)
    return int(lines[-1]["step"]) if lines else 0
