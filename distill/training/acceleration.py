"""Accelerate for one run: as the recipe says, whatever was used before in this process."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from distill import distributed
from distill.errors import RecipeError
from distill.training.settings import TrainConfig

if TYPE_CHECKING:
    from accelerate import Accelerator


@contextmanager
def accelerator_of(config: TrainConfig, output: Path) -> Iterator["Accelerator"]:
    """An Accelerator with a precision and an accumulation of its own; the caller's is afterwards as it was.

    Accelerate keeps both for the whole process. Without this a second run in a notebook would have the first one's precision,
    and after a loop that stopped between two accumulated batches no step would change a weight.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState
    from accelerate.utils import DistributedType, GradientAccumulationPlugin

    _require_trackers(config)
    distributed.device()
    shared = (AcceleratorState, GradientState)
    before = [dict(state._shared_state) for state in shared]
    for state in shared:
        state._reset_state()
    try:
        accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            log_with=list(config.trackers) or None,
            project_dir=str(output),
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # a step weighs its batches itself
        )
        kind = accelerator.distributed_type
        if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
            raise RecipeError(
                f"the launcher asks for {kind.value}; a student is small, and its copies are trained side by side (DDP). Launch "
                "with --multi_gpu, or without a configuration."
            )
        yield accelerator
    finally:
        for state, values in zip(shared, before, strict=True):
            state._reset_state()
            state._shared_state.update(values)


def unprepare(student: nn.Module) -> dict[str, Any]:
    """Take off what `Accelerator.prepare` put on a module itself, its precision; `vars(student).update` gives it back."""
    names = ("forward", "_original_forward", "_is_accelerate_prepared")
    return {name: vars(student).pop(name) for name in names if name in vars(student)}


def _require_trackers(config: TrainConfig) -> None:
    from accelerate.tracking import get_available_trackers

    installed = [str(tracker) for tracker in get_available_trackers()]
    absent = [name for name in config.trackers if name not in installed]
    if absent:
        raise RecipeError(
            f"{', '.join(absent)}: not an installed tracker; installed are {', '.join(installed) or 'none'}. pip install it."
        )
