"""How a student is trained: the settings of a run, checked before any weight is loaded."""

import math
from dataclasses import dataclass
from typing import Literal

from distill.errors import RecipeError


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a student is trained."""

    steps: int | None = None
    """Optimizer steps; None: as many as `epochs` need."""
    epochs: float = 1.0
    """Passes over the texts, if `steps` is not given."""
    batch_size: int = 256
    """Texts a batch over all processes; a loss that compares texts sees this many."""
    accumulation: int = 1
    """Batches a step; their losses are averaged by rows. It does not enlarge the batch that a loss sees."""
    micro_batch: int | None = None
    """Texts of a process run at once; None: the whole batch, smaller when memory runs out. The loss sees the whole batch either way."""
    learning_rate: float = 1e-3
    """Peak of AdamW's learning rate."""
    weight_decay: float = 0.01
    """On matrices only; biases, norms, token weights and scales have none."""
    warmup_fraction: float = 0.1
    """Share of the steps in which the rate rises from 0."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """What the rate does after the warm-up."""
    clip_norm: float | None = 1.0
    """Largest norm of the gradient; None leaves it."""
    dropout: bool = False
    """Keep the model's own dropout on. A student that copies vectors is better without."""
    bank_size: int = 0
    """Further teacher vectors of the training texts, at most as many as there are, as columns of student x teacher losses."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """bf16: autocast in the encoder; losses stay in float32."""
    seed: int = 0
    """Of the order of texts and of dropout."""
    save_every: int | None = None
    """Steps between checkpoints; None: ten a run."""
    keep_checkpoints: int = 2
    """How many whole checkpoints stay."""
    trackers: tuple[str, ...] = ()
    """Accelerate trackers beside metrics.jsonl: tensorboard, trackio, wandb."""
    resume: bool = False
    """Go on from the newest whole checkpoint of the output folder, if there is one."""

    def __post_init__(self) -> None:
        positive = (
            "steps",
            "epochs",
            "batch_size",
            "accumulation",
            "micro_batch",
            "learning_rate",
            "clip_norm",
            "save_every",
            "keep_checkpoints",
        )
        wrong = [
            f"{name} is above 0, got {value}"
            for name in positive
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf
        ]
        wrong += [
            f"{name} is 0 or more, got {value}"
            for name in ("weight_decay", "bank_size", "seed")
            if not 0 <= (value := getattr(self, name)) < math.inf
        ]
        if not 0 <= self.warmup_fraction <= 1:
            wrong.append(f"warmup_fraction is 0..1, got {self.warmup_fraction}")
        if wrong:
            raise RecipeError("; ".join(wrong) + ".")
