"""The training loop: permutation(seed, epoch) -> student vectors -> loss against stored teacher vectors -> AdamW -> average.

One integer, the step, is the whole position of a run: what is drawn at a step depends on seed and step alone, not on the
number of processes. Every loss is the loss of the global batch (`distributed.global_loss`).
"""

import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from distill import distributed, files, run_lock, runlog
from distill.encoder import Encoder
from distill.errors import IntegrityError, NumericsError, Stopped
from distill.modules import Reading, TransformerBackbone
from distill.store import Store
from distill.training import checkpoint, execution, finite, optimizer, sampling
from distill.training.acceleration import accelerator_of, unprepare
from distill.training.averaging import WeightAverage
from distill.training.examples import Examples
from distill.training.feed import Feed, Loss
from distill.training.gradients import StepGradients
from distill.training.settings import TrainConfig
from distill.training.stopping import stop_signals

if TYPE_CHECKING:
    from accelerate import Accelerator


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
    padding: float | None = None
    """Share of the student's places that were padding, on the main process; None of a static one, which has none."""


def train(
    student: Encoder,
    data: Examples,
    store: Store,
    loss: Loss,
    config: TrainConfig,
    *,
    output: str | Path,
    seconds: float = math.inf,
) -> Run:
    """Train `student` in place and return the run; writes OUTPUT/metrics.jsonl and OUTPUT/checkpoints.

    With config.ema_decay the student ends as the average of its weights; its last own weights are in the last checkpoint.

    Those of an earlier run in OUTPUT are deleted, unless config.resume; RecipeError while another process trains there. The
    step at which `seconds` have passed is the last; the rate's schedule is one of all steps, and cut short there.

    `loss` is called as loss(student, teacher); one with `uses_bank` also gets bank=, keys=, bank_keys=. A loss or gradient
    that is not finite stops all processes before the update (NumericsError, rows in OUTPUT/non-finite.json). Ctrl-C and
    SIGTERM finish the step, save, and raise Stopped.
    """
    with accelerator_of(config, Path(output)) as accelerator, run_lock.held(Path(output)):
        return _Loop(student, data, store, loss, config, Path(output), accelerator).run(seconds)


class _Loop:
    def __init__(
        self,
        student: Encoder,
        data: Examples,
        store: Store,
        loss: Loss,
        config: TrainConfig,
        output: Path,
        accelerator: "Accelerator",
    ):
        self.student, self.data, self.store, self.loss = student, data, store, loss
        self.config, self.output, self.accelerator = config, output, accelerator
        torch.manual_seed(config.seed + distributed.rank())
        per_epoch = sampling.steps_per_epoch(len(data), config.batch_size, config.accumulation)
        self.steps = config.steps or max(1, round(config.epochs * per_epoch))
        student.to(self.accelerator.device)
        self._progress(0)
        self.identity = self._identity()
        self.adamw = optimizer.adamw(student, config)
        self.rate = optimizer.rate_of(self.adamw, config, self.steps)
        self.average = WeightAverage(student, config.ema_decay) if config.ema_decay else None
        self.feed = Feed(data, store, loss, config, steps=self.steps, device=self.accelerator.device)
        self.anchor = optimizer.anchor_of(student, data.tokens.ids, config)
        self.read = Reading()  # by the student, in this run
        # From here on the student is changed, until the end of `run`: what cannot be run has been refused before.
        self.rows = optimizer.rows_of(student, self.adamw, config, self.average)
        self.prepared_by_caller = unprepare(student)
        self.model, self.optimizer = self.accelerator.prepare(student, self.adamw)
        self.gradients = StepGradients(
            student, self.model, micro_batch=config.micro_batch or config.batch_size, device=self.accelerator.device
        )

    def run(self, seconds: float) -> Run:
        try:
            with execution.as_asked(self.student, self.config):
                return self._run(seconds)
        finally:
            self.feed.close()
            unprepare(self.student)
            vars(self.student).update(self.prepared_by_caller)
            if self.rows:
                self.rows.give_back()
            self.student.eval()

    def _run(self, limit: float) -> Run:
        first, last, before = self._resume()
        done = first
        self.feed.prepare()
        began, texts = time.monotonic(), before["texts"]

        def seconds() -> float:
            return before["seconds"] + time.monotonic() - began

        distributed.main_first(partial(runlog.cut, self.output, first))
        self.student.train(self.config.dropout)
        self._padding()  # of whatever read the student before
        self.read = Reading()
        every = self.config.save_every or max(1, self.steps // 10)
        log_to = runlog.opened(self.output, self.accelerator, asdict(self.config))
        with stop_signals() as stop, log_to as log, _bar(first, self.steps) as bar:
            for step in range(first, self.steps):
                last, asked, late = self._step(step, lambda: (bool(stop), time.monotonic() - began > limit))
                done = step + 1
                texts += last["texts"]
                log(last)
                bar.update()
                bar.set_postfix(loss=f"{last['loss']:.4f}")
                if asked or late or done % every == 0 or done == self.steps:
                    self._save(done, last, {"seconds": seconds(), "texts": texts})
                if asked and done < self.steps:
                    raise self._stopped(done, distributed.gather_objects(list(stop)))
                if late:
                    break
        if self.rows:
            self.rows.finish(done)
        if self.average:
            self.average.apply()
        spent = seconds()
        speed, settings, report = texts / max(spent, 1e-9), asdict(self.config), self.data.report
        padding = self.read.padding if self.read.places else None
        return Run(self.student, done, spent, speed, last["loss"], self.output, report, settings, padding)

    def _step(self, step: int, ends: Callable[[], tuple[bool, bool]]) -> tuple[dict[str, Any], bool, bool]:
        """What is logged of the step, and whether any process found that the run ends with it: asked to, or late.

        All that processes vote on is asked before the update, at once: a device is waited for there anyway, and not again.
        """
        began = time.monotonic()
        self._progress(step)
        rows = np.concatenate(self.feed.batches(step))
        if self.rows:
            self.rows.lend(step, self.data.tokens.rows(torch.from_numpy(rows)).ids)
        value = self.gradients.add(self.feed.parts(step))
        if self.rows:
            self.rows.exchange()
        norm = nn.utils.clip_grad_norm_(self.student.parameters(), self.config.clip_norm or math.inf)
        terms = {f"loss/{name}": part for name, part in self.feed.terms().items()}
        numbers = finite.numbers({"loss": value, **terms, "grad_norm": norm})
        broken = not finite.are_finite(numbers["loss"], numbers["grad_norm"])
        broken, asked, late = distributed.any_process_each([broken, *ends()], self.accelerator.device)
        if broken:
            self._refuse(step, rows, numbers["loss"], numbers["grad_norm"])
        rate = self.rate(step + 0.5)
        optimizer.set_rate(self.adamw, rate)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.rows:
            self.rows.update(step, rate, self.average.share(step) if self.average else 0.0)
        if self.anchor:
            self.anchor.pull(self.config.learning_rate * self.config.table_rate * rate)
        if self.average:
            self.average.update(step)
        entry = {
            "step": step + 1,
            **numbers,
            "lr": self.config.learning_rate * rate,
            "texts": len(rows),
            "order": files.digest(rows.tobytes())[:8],
            **self._padding(),
            "seconds": round(time.monotonic() - began, 4),
        }
        return entry, asked, late

    def _padding(self) -> dict[str, float]:
        """Of the step, on this process."""
        if not isinstance(self.student.backbone, TransformerBackbone):
            return {}
        here = self.student.backbone.take_reading()
        self.read += here
        return {"padding": round(here.padding, 4)}

    def _progress(self, step: int) -> None:
        if hasattr(self.loss, "set_progress"):
            self.loss.set_progress(step / self.steps)

    def _refuse(self, step: int, rows: np.ndarray, loss: float, norm: float) -> NoReturn:
        """Name the rows whose student or teacher vector is not finite (all of the step's, if each is), and stop."""
        tokens, targets = self.data.tokens.rows(torch.from_numpy(rows)), self.store.take(self.data.rows[rows])
        bad = rows[finite.bad_rows(self.student, tokens, targets).numpy()]
        suspects = [{"row": int(row), "text": self.data.texts[row][:200]} for row in (bad if len(bad) else rows)]
        report = {"step": step + 1, "loss": str(loss), "grad_norm": str(norm), "rows": suspects}
        where = self.output / "non-finite.json"
        distributed.main_first(partial(files.write_json, where, report))
        raise NumericsError(
            f"{finite.stopped(step + 1, loss, norm, len(bad))}; the rows are in {where}. Lower --train.learning-rate, or leave "
            "the rows out."
        )

    def _identity(self) -> dict[str, Any]:
        """What must be equal for a checkpoint to be continued, as JSON gives it back."""
        shapes = {name: list(value.shape) for name, value in self.student.state_dict().items()}
        trained = [name for name, parameter in self.student.named_parameters() if parameter.requires_grad]
        has_bank = self.config.bank_size and getattr(self.loss, "uses_bank", False)
        return {
            **self.config.identity(),
            "steps": self.steps,
            "loss": _describe(self.loss),
            "texts": files.digest(self.data.keys.numpy().tobytes())[:12],
            "teacher": self.store.digest,
            "student": files.digest(json.dumps([shapes, trained]).encode())[:12],
            # Without it a run drew banks in the order of the next seed's texts; one that has none goes on.
            **({"bank_order": f"permutation(seed, epoch, {sampling.BANK})"} if has_bank else {}),
        }

    def _resume(self) -> tuple[int, dict[str, Any], dict[str, Any]]:
        """The step to begin with, what was logged of the one before, and the seconds and texts of all before."""
        folder, nothing = self.output / "checkpoints", ({"loss": math.nan}, {"seconds": 0.0, "texts": 0})
        if not self.config.resume:
            distributed.main_first(partial(checkpoint.clear, folder))
            return 0, *nothing
        found = checkpoint.load_latest(
            folder, self.student, self.adamw, accept=self._refuse_other, further=self._kept()
        )
        if found is None:
            if distributed.is_main():
                print(f"no checkpoint in {folder}: from the first step", file=sys.stderr)
            return 0, *nothing
        distributed.main_first(partial(checkpoint.tidy, folder, found.step, self.config.keep_checkpoints))
        fitting = self.gradients.micro_batch
        fitting.size = min(fitting.size, found.state.get("micro_batch", fitting.size))
        return found.step, found.state["last"], found.state.get("spent", nothing[1])

    def _refuse_other(self, state: dict[str, Any]) -> None:
        saved = state["identity"]
        differing = [
            f"{name} (was {saved.get(name)}, is {self.identity.get(name)})"
            for name in self.identity | saved
            if saved.get(name) != self.identity.get(name)
        ]
        if differing:
            raise IntegrityError(
                f"{self.output / 'checkpoints'} belongs to another run; what differs: {', '.join(differing)}. "
                "Use the same recipe, another --output, or leave out --train.resume."
            )

    def _kept(self) -> checkpoint.Further:
        """What a checkpoint holds beside the weights. The start of a table is not built again: it may differ in a bit."""
        average = {"average": self.average.tensors} if self.average else {}
        rows = {"rows": self.rows.state()} if self.rows else {}
        return {**average, **rows, **({"start": {"table": self.anchor.start}} if self.anchor else {})}

    def _save(self, step: int, last: dict[str, Any], spent: dict[str, Any]) -> None:
        folder = self.output / "checkpoints"
        state: dict[str, Any] = {"identity": self.identity, "last": last, "spent": spent}
        if (fitting := self.gradients.micro_batch.size) < (self.config.micro_batch or self.config.batch_size):
            state["micro_batch"] = fitting  # what memory was enough for
        keep, further = self.config.keep_checkpoints, self._kept()
        distributed.main_first(partial(runlog.sync, self.output))
        checkpoint.save(folder, step, self.student, self.adamw, state, keep=keep, further=further)

    def _stopped(self, step: int, signals: list[list[int]]) -> Stopped:
        number = next(number for numbers in signals for number in numbers)
        return Stopped(
            f"stopped after step {step} of {self.steps}; everything is saved. Run the same command with --train.resume to go on.",
            128 + number,
        )


def _describe(loss: Loss) -> str:
    """The same in every process and run: a repr with an address in it would not be."""
    if isinstance(loss, partial):
        return f"{_describe(loss.func)} {loss.args} {sorted(loss.keywords.items())}"
    return repr(loss) if isinstance(loss, nn.Module) else getattr(loss, "__qualname__", type(loss).__name__)


def _bar(first: int, total: int) -> tqdm:
    hides = distributed.hides_bars()
    return tqdm(total=total, initial=first, desc="training", unit="step", delay=2, disable=hides)
