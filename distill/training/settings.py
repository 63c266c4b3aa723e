"""How a student is trained: the settings of a run, checked before any weight is loaded."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from distill.errors import RecipeError

# Settings that may differ between a run and its continuation: they change no step of it but by rounding, and, where a micro-batch is
# another, by what dropout drops.
_FREE = ("micro_batch", "resume", "save_every", "keep_checkpoints", "trackers", "gradient_checkpointing", "read_ahead")
# Settings that are part of a run only where they are not at their default: runs from before there were any go on.
_ADDED = (
    "projection_rate",
    "token_weight_rate",
    "table_rate",
    "table_update",
    "compile",
    "layer_decay",
    "start_decay",
    "ema_decay",
    "hard_stage",
    "hard_neighbours",
    "hard_margin",
)


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
    """Batches a step; their losses are averaged by rows. A loss still sees one batch."""
    micro_batch: int | None = None
    """Texts run at once; None: all, fewer when memory runs out. The loss sees all."""
    learning_rate: float = 1e-3
    """Peak of AdamW's learning rate."""
    weight_decay: float = 0.01
    """On matrices only; biases, norms, token weights and scales have none."""
    projection_rate: float = 1.0
    """Multiplies the rate of the student's last Dense layer."""
    token_weight_rate: float = 1.0
    """Multiplies the rate of a static table's token weights."""
    table_rate: float = 1.0
    """Multiplies the rate of the token table, a static one or a transformer's."""
    table_update: Literal["dense", "rows"] = "dense"
    """rows: update a row of a static table only when a text uses it, with all the AdamW steps it missed."""
    layer_decay: float = 1.0
    """Multiplies the rate of a transformer's layer, once for each layer above it."""
    start_decay: float | None = None
    """Strength of the pull of a static table's rows back to their start, divided by 1 + the token's count in the texts."""
    ema_decay: float | None = None
    """Decay of a running average of the weights, which becomes the student: .9 to .999. None or 0: no average."""
    warmup_fraction: float = 0.1
    """Share of the steps in which the rate rises from 0."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """What the rate does after the warm-up."""
    clip_norm: float | None = 1.0
    """Clip the gradient to this norm. 0: do not clip."""
    dropout: bool = False
    """Keep the model's dropout. A student that copies vectors is better without."""
    bank_size: int = 0
    """Further teacher vectors, of other texts, as columns of student x teacher losses."""
    hard_stage: float | None = None
    """Share of the steps, at the end, in which the bank holds hard negatives: the batch's nearest texts by the teacher."""
    hard_neighbours: int = 16
    """In the hard stage: how many nearest texts of each text, as far as bank_size goes."""
    hard_margin: float = 0.95
    """In the hard stage: leave out texts of a higher cosine by the teacher, which say the same."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """bf16: autocast in the encoder; losses stay in float32."""
    compile: bool = False
    """Compile a transformer with torch.compile: a minute before the first step; results differ by rounding."""
    gradient_checkpointing: bool = False
    """Run a transformer's layers again in the backward pass: less memory, more time."""
    read_ahead: bool | None = None
    """Read a step's vectors in a thread while the one before runs; None: on CUDA."""
    seed: int = 0
    """Of the order of texts and of dropout."""
    save_every: int | None = None
    """Steps between checkpoints; None: ten a run."""
    keep_checkpoints: int = 2
    """How many whole checkpoints stay."""
    trackers: tuple[str, ...] = ()
    """Accelerate trackers beside metrics.jsonl: tensorboard, trackio, wandb."""
    resume: bool = False
    """Go on from the newest whole checkpoint in the output folder."""

    def __post_init__(self) -> None:
        positive = (
            "steps",
            "epochs",
            "batch_size",
            "accumulation",
            "micro_batch",
            "learning_rate",
            "save_every",
            "keep_checkpoints",
            "projection_rate",
            "token_weight_rate",
            "table_rate",
            "start_decay",
            "hard_neighbours",
        )
        wrong = out_of_range(self, positive, ("weight_decay", "bank_size", "seed", "clip_norm"))
        if not 0 <= self.warmup_fraction <= 1:
            wrong.append(f"warmup_fraction is 0..1, got {self.warmup_fraction}")
        wrong += [*self._wrong_shares(), *self._wrong_choices()]
        if self.hard_stage is not None and not self.bank_size:
            wrong.append("hard_stage fills the bank with neighbours: give bank_size, too")
        if self.start_decay is not None and self.table_update == "rows":
            wrong.append(
                "start_decay pulls every row at every step, which table_update rows is to avoid: leave one out"
            )
        if wrong:
            raise RecipeError("; ".join(wrong) + ".")

    def check_bank(self, loss: object) -> None:
        """RecipeError for a hard_stage where the loss (or its flags) has no `uses_bank`: nothing would take the neighbours."""
        if self.hard_stage and not getattr(loss, "uses_bank", False):
            raise RecipeError("--train.hard-stage fills the bank of a loss, and this one uses none. Leave it out.")

    def _wrong_shares(self) -> list[str]:
        one_too = {"layer_decay": self.layer_decay, "hard_stage": self.hard_stage, "hard_margin": self.hard_margin}
        wrong = [f"{n} is above 0, up to 1, got {v}" for n, v in one_too.items() if v is not None and not 0 < v <= 1]
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            wrong.append(f"ema_decay is 0 or more, below 1, got {self.ema_decay}")
        return wrong

    def _wrong_choices(self) -> list[str]:
        hints = get_type_hints(type(self))
        choices = {name: get_args(hint) for name, hint in hints.items() if get_origin(hint) is Literal}
        wrong = [
            f"{name} is {' or '.join(map(repr, known))}, got {getattr(self, name)!r}"
            for name, known in choices.items()
            if getattr(self, name) not in known
        ]
        if isinstance(self.trackers, str):
            wrong.append(f"trackers are names in a tuple, got {self.trackers!r}")
        return wrong

    def identity(self) -> dict[str, Any]:
        """What must be equal for a run to be continued."""
        defaults = {field.name: field.default for field in fields(self)}
        return {
            name: value
            for name, value in asdict(self).items()
            if name not in _FREE and not (name in _ADDED and value == defaults[name])
        }


def out_of_range(settings: Any, positive: Sequence[str], from_zero: Sequence[str]) -> list[str]:
    """What is wrong with these numbers of a group of flags, each a part of a message. None is a number left out."""
    wrong = []
    for names, least in ((positive, "above 0"), (from_zero, "0 or more")):
        given = {name: value for name in names if (value := getattr(settings, name)) is not None}
        for name, value in given.items():
            if value == math.inf:
                wrong.append(f"{name} is finite, got {value}")
            elif not value >= 0 or (value == 0 and names is positive):
                wrong.append(f"{name} is {least}, got {value}")
    return wrong
