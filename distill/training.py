"""The training loop: permutation(seed, epoch) -> student vectors -> loss against stored teacher vectors -> AdamW.

One integer, the step, is the whole position of a run: what is drawn at a step depends on seed and step alone, not on the
number of processes. Every loss is the loss of the global batch (`distributed.global_loss`).
"""

import json
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from distill import checkpoint, distributed, files
from distill.encoder import Encoder
from distill.errors import IntegrityError, NumericsError, RecipeError, Stopped
from distill.examples import Examples
from distill.store import Store

Loss = Callable[..., Float[Tensor, ""]]


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
    """Further teacher vectors, drawn from the store, as columns of the losses that compare student with teacher rows."""
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
            "learning_rate",
            "clip_norm",
            "save_every",
            "keep_checkpoints",
        )
        wrong = [
            f"{name} is above 0, got {value}"
            for name in positive
            if (value := getattr(self, name)) is not None and not value > 0
        ]
        wrong += [
            f"{name} is 0 or more, got {value}"
            for name in ("weight_decay", "bank_size", "seed")
            if (value := getattr(self, name)) < 0
        ]
        if not 0 <= self.warmup_fraction <= 1:
            wrong.append(f"warmup_fraction is 0..1, got {self.warmup_fraction}")
        if wrong:
            raise RecipeError("; ".join(wrong) + ".")


@dataclass(frozen=True)
class Run:
    """A finished run."""

    student: Encoder
    steps: int
    seconds: float
    texts_per_second: float
    final_loss: float
    output: Path
    report: str = ""
    settings: dict[str, Any] = field(default_factory=dict)


def train(
    student: Encoder, data: Examples, store: Store, loss: Loss, config: TrainConfig, *, output: str | Path
) -> Run:
    """Train `student` in place and return the run; writes OUTPUT/metrics.jsonl and OUTPUT/checkpoints.

    `loss` is called as loss(student, teacher); one with `uses_bank` also gets bank=, keys=, bank_keys=. A loss or gradient
    that is not finite stops all processes before the update (NumericsError, rows in OUTPUT/non-finite.json). Ctrl-C and
    SIGTERM finish the step, save, and raise Stopped.
    """
    return _Loop(student, data, store, loss, config, Path(output)).run()


class _Loop:
    def __init__(self, student: Encoder, data: Examples, store: Store, loss: Loss, config: TrainConfig, output: Path):
        from accelerate import Accelerator
        from transformers import get_scheduler

        self.student, self.data, self.store, self.loss, self.config, self.output = (
            student,
            data,
            store,
            loss,
            config,
            output,
        )
        self.accelerator = Accelerator(
            mixed_precision=config.mixed_precision, log_with=list(config.trackers) or None, project_dir=str(output)
        )
        torch.manual_seed(config.seed + distributed.rank())
        self.per_epoch = -(-len(data) // (config.batch_size * config.accumulation))
        self.steps = config.steps or max(1, round(config.epochs * self.per_epoch))
        student.to(self.accelerator.device)
        self.adamw = _adamw(student, config)
        self.model, self.optimizer = self.accelerator.prepare(student, self.adamw)
        name = "constant_with_warmup" if config.schedule == "constant" else config.schedule
        warmup = round(config.warmup_fraction * self.steps)
        schedule = get_scheduler(name, self.adamw, num_warmup_steps=warmup, num_training_steps=self.steps)
        self.rate: Callable[[float], float] = schedule.lr_lambdas[0]  # of the step alone: nothing to save
        self.identity = self._identity()

    def run(self) -> Run:
        began, first = time.monotonic(), self._resume()
        if self.config.trackers:
            flat = {name: value for name, value in asdict(self.config).items() if isinstance(value, int | float | str)}
            self.accelerator.init_trackers("distill", config=flat)
        self.student.train(self.config.dropout)
        every = self.config.save_every or max(1, self.steps // 10)
        last = {"loss": float("nan")}
        with _stop_signals() as stop, self._log(first) as log, _bar(first, self.steps) as bar:
            for step in range(first, self.steps):
                last = self._step(step)
                log(last)
                bar.update()
                bar.set_postfix(loss=f"{last['loss']:.4f}")
                asked = distributed.any_process(bool(stop), self.accelerator.device)
                if asked or (step + 1) % every == 0 or step + 1 == self.steps:
                    self._save(step + 1)
                if asked and step + 1 < self.steps:
                    raise self._stopped(step + 1, distributed.gather_objects(list(stop)))
        return self._finished(first, time.monotonic() - began, last["loss"])

    def _step(self, step: int) -> dict[str, Any]:
        began = time.monotonic()
        if hasattr(self.loss, "set_progress"):
            self.loss.set_progress(step / self.steps)
        batches = list(self._batches(step))
        total = sum(len(batch) for batch in batches)
        value = torch.zeros((), device=self.accelerator.device)
        for number, batch in enumerate(batches):
            last = number == len(batches) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                part = self._forward(step, number, batch) * (len(batch) / total)
                self.accelerator.backward(part)
            value += part.detach()
        norm = nn.utils.clip_grad_norm_(self.student.parameters(), self.config.clip_norm or float("inf"))
        if distributed.any_process(not bool(torch.isfinite(value) & torch.isfinite(norm)), self.accelerator.device):
            self._refuse(step, batches, float(value), float(norm))
        rate = self.rate(step + 0.5)
        for group in self.adamw.param_groups:
            group["lr"] = group["initial_lr"] * rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        parts = {f"loss/{name}": float(part) for name, part in getattr(self.loss, "parts", dict)().items()}
        seconds = time.monotonic() - began
        return {
            "step": step + 1,
            "loss": float(value),
            **parts,
            "lr": self.config.learning_rate * rate,
            "grad_norm": float(norm),
            "texts": total,
            "seconds": round(seconds, 4),
        }

    def _batches(self, step: int) -> Iterator[np.ndarray]:
        """The global batches of a step: the next rows of permutation(seed, epoch); the last of an epoch may be smaller."""
        epoch, place = divmod(step, self.per_epoch)
        size = self.config.batch_size
        order = _permutation(self.config.seed, epoch, len(self.data))
        rows = order[place * size * self.config.accumulation :][: size * self.config.accumulation]
        return (rows[start : start + size] for start in range(0, len(rows), size))

    def _forward(self, step: int, number: int, batch: np.ndarray) -> Float[Tensor, ""]:
        device = self.accelerator.device
        share = distributed.share(len(batch))
        mine = batch[share.start : share.stop]
        tokens = self.data.tokens.rows(torch.from_numpy(mine if len(mine) else batch[:1]))
        vectors = self.model(tokens)[: len(mine)]  # a process without rows runs one, so that DDP finds every parameter
        teacher = self.store.take(self.data.rows[mine]).to(device)
        bank, bank_keys = self._bank(step * self.config.accumulation + number)
        keys = self.data.keys[torch.from_numpy(mine)].to(device)
        return distributed.global_loss(self.loss, vectors, teacher, bank=bank, keys=keys, bank_keys=bank_keys)

    def _bank(self, draw: int) -> tuple[Tensor | None, Tensor | None]:
        """The draw-th window of a permutation of the training rows: the same on every process, no row twice."""
        size = min(self.config.bank_size, len(self.data))
        if not size or not getattr(self.loss, "uses_bank", False):
            return None, None
        windows = len(self.data) // size
        order = _permutation(self.config.seed + 1, draw // windows, len(self.data))
        chosen = order[draw % windows * size :][:size]
        device = self.accelerator.device
        return self.store.take(self.data.rows[chosen]).to(device), self.data.keys[torch.from_numpy(chosen)].to(device)

    def _refuse(self, step: int, batches: Sequence[np.ndarray], loss: float, norm: float) -> None:
        """Name the rows whose student vector is not finite (all of the step's, if each is), and stop before the update."""
        rows = np.concatenate(batches)
        with torch.no_grad():
            vectors = torch.cat(
                [
                    self.student(self.data.tokens.rows(torch.from_numpy(part)))
                    for part in np.array_split(rows, -(-len(rows) // 64))
                ]
            )
        bad = rows[(~torch.isfinite(vectors).all(dim=1)).cpu().numpy()]
        suspects = [{"row": int(row), "text": self.data.texts[row][:200]} for row in (bad if len(bad) else rows)]
        where = self.output / "non-finite.json"
        distributed.main_first(
            partial(
                files.write_json, where, {"step": step + 1, "loss": str(loss), "grad_norm": str(norm), "rows": suspects}
            )
        )
        raise NumericsError(
            f"step {step + 1}: loss {loss}, gradient norm {norm}; stopped before the update. {len(bad) or 'No'} student vectors are not finite; "
            f"the rows are in {where}. Lower --train.learning-rate, or leave the rows out."
        )

    def _identity(self) -> dict[str, Any]:
        """What must be equal for a checkpoint to be continued, as JSON gives it back."""
        free = ("resume", "save_every", "keep_checkpoints", "trackers")
        chosen = {name: value for name, value in asdict(self.config).items() if name not in free}
        loss = (
            repr(self.loss)
            if isinstance(self.loss, nn.Module)
            else getattr(self.loss, "__qualname__", type(self.loss).__name__)
        )
        shapes = json.dumps({name: list(value.shape) for name, value in self.student.state_dict().items()})
        texts, student = files.digest(self.data.keys.numpy().tobytes()), files.digest(shapes.encode())
        return {**chosen, "steps": self.steps, "texts": texts, "loss": loss, "student": student}

    def _resume(self) -> int:
        folder = self.output / "checkpoints"
        if not self.config.resume:
            distributed.main_first(partial(checkpoint.clear, folder))
            return 0
        found = checkpoint.load_latest(folder, self.student, self.adamw, device=self.accelerator.device)
        if found is None:
            return 0
        saved = found.state["identity"]
        differing = [
            f"{name} (was {saved.get(name)}, is {value})"
            for name, value in self.identity.items()
            if saved.get(name) != value
        ]
        if differing:
            raise IntegrityError(
                f"{folder} belongs to another run; what differs: {', '.join(differing)}. "
                "Use the same recipe, another --output, or leave out --train.resume."
            )
        return found.step

    def _save(self, step: int) -> None:
        folder, state = self.output / "checkpoints", {"identity": self.identity}
        checkpoint.save(folder, step, self.student, self.adamw, state, keep=self.config.keep_checkpoints)

    @contextmanager
    def _log(self, first: int) -> Iterator[Callable[[dict[str, Any]], None]]:
        """metrics.jsonl on the main process, cut back to the resumed step, and the trackers."""
        path = self.output / "metrics.jsonl"
        if not distributed.is_main():
            yield lambda _: None
            return
        lines = path.read_text(encoding="utf-8").splitlines() if first and path.exists() else []
        with files.published_file(path) as temporary:
            temporary.write_text("".join(line + "\n" for line in lines[:first]), encoding="utf-8")
        with path.open("a", encoding="utf-8", buffering=1) as file:

            def log(entry: dict[str, Any]) -> None:
                file.write(json.dumps(entry) + "\n")
                if self.config.trackers:
                    self.accelerator.log(
                        {name: value for name, value in entry.items() if name != "step"}, step=entry["step"]
                    )

            yield log

    def _stopped(self, step: int, signals: list[list[int]]) -> Stopped:
        number = next(number for numbers in signals for number in numbers)
        code = 128 + number
        return Stopped(
            f"stopped after step {step} of {self.steps}; everything is saved. Run the same command with --train.resume to go on.",
            code,
        )

    def _finished(self, first: int, seconds: float, loss: float) -> Run:
        if self.config.trackers:
            self.accelerator.end_training()
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        texts = min(self.config.batch_size * self.config.accumulation, len(self.data)) * (self.steps - first)
        return Run(
            self.student.eval(),
            self.steps,
            seconds,
            texts / max(seconds, 1e-9),
            loss,
            self.output,
            self.data.report,
            asdict(self.config),
        )


def freeze_token_table(student: Encoder) -> None:
    """Leave a transformer's input embeddings out of training: on a CPU their dense update costs more than the layers'."""
    student.backbone.model.get_input_embeddings().requires_grad_(False)


def _adamw(student: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trained if parameter.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [parameter for parameter in trained if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=config.learning_rate, fused=True)


def _permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(count)


def _bar(first: int, total: int) -> tqdm:
    return tqdm(
        total=total,
        initial=first,
        desc="training",
        unit="step",
        delay=2,
        disable=None if distributed.is_main() else True,
    )


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """The signals that asked to stop, as they come; a second one stops at once."""
    seen: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)

    try:
        before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: its owner handles signals
        before = {}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
