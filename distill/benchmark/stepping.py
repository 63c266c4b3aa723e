"""So many training steps from one start on the same texts: distill's loop, and other libraries' trainers.

A step's time is taken from one step to the next, so that it holds all that a step costs: reading, tokenizing, logging.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.data import BatchSampler, SequentialSampler

from distill import distributed
from distill.benchmark.peers import train_in_trainer
from distill.encoder import Encoder
from distill.losses import CosineDistance
from distill.modules import StaticTable, TransformerBackbone
from distill.store import Store
from distill.training import Examples, TrainConfig, sampling, train


@dataclass(frozen=True, kw_only=True)
class Job:
    """What each way gets: a start and the same one as a sentence-transformers folder, what it learns, and the settings.

    `warm_up` steps are left out of the time.
    """

    start: Encoder
    folder: Path
    examples: Examples
    store: Store
    config: TrainConfig
    warm_up: int
    output: Path

    @property
    def steps(self) -> int:
        assert self.config.steps is not None
        return self.config.steps

    def rows(self) -> np.ndarray:
        """Rows of the examples in the order in which distill's steps read them."""
        size, seed = self.config.batch_size, self.config.seed
        parts = [
            sampling.batches(step, len(self.examples), batch_size=size, accumulation=1, seed=seed)
            for step in range(self.steps)
        ]
        return np.concatenate([np.concatenate(part) for part in parts])

    def vectors(self, rows: np.ndarray) -> Float[Tensor, "n e"]:
        return self.store.take(self.examples.rows[rows])


@dataclass(frozen=True)
class Stepped:
    """Seconds a step, and the student after the last one; None where it is not to be compared."""

    seconds: float
    student: Encoder | None = None


# distill


class Clocked(nn.Module):
    """A loss that notes when it is called: once a step."""

    def __init__(self, loss: nn.Module):
        super().__init__()
        self.loss = loss
        self.times: list[float] = []

    def forward(self, student: Float[Tensor, "b d"], teacher: Float[Tensor, "b d"]) -> Float[Tensor, ""]:
        self.times.append(time.perf_counter())
        return self.loss(student, teacher)


def ours(job: Job, **changes: Any) -> Stepped:
    """distill's `train`; `changes` are settings of TrainConfig."""
    student, loss = copy.deepcopy(job.start), Clocked(CosineDistance())
    config = replace(job.config, save_every=job.steps, **changes)
    train(student, job.examples, job.store, loss, config, output=job.output / "distill")
    return Stepped(_a_step(loss.times, job.warm_up), student)


def by_rows(job: Job) -> Stepped:
    return ours(job, table_update="rows")


def in_bf16(job: Job) -> Stepped:
    return ours(job, mixed_precision="bf16")


# sentence-transformers


def trainer(job: Job) -> Stepped:
    """EmbedDistillLoss in its trainer as it comes: its own order of texts, the model's dropout, all of the model trained."""
    return _in_trainer(job, same=False)


def trainer_alike(job: Job) -> Stepped:
    """The same with distill's batches, without dropout, with the parts frozen that distill does not train."""
    return _in_trainer(job, same=True)


def _in_trainer(job: Job, *, same: bool) -> Stepped:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(job.folder), device=str(distributed.device()))
    rows = job.rows() if same else np.arange(len(job.examples))
    further: dict[str, Any] = {"batch_sampler": _in_order} if same else {}
    if same:
        _freeze(model, job.start)
    times = train_in_trainer(
        model,
        [job.examples.texts[row] for row in rows],
        job.vectors(rows),
        output_dir=str(job.output / "trainer"),
        per_device_train_batch_size=job.config.batch_size,
        learning_rate=job.config.learning_rate,
        weight_decay=job.config.weight_decay,
        warmup_steps=round(job.config.warmup_fraction * job.steps),
        max_steps=job.steps,
        seed=job.config.seed,
        bf16=job.config.mixed_precision == "bf16",
        **further,
    )
    model.save(str(job.output / "student"))
    return Stepped(_a_step(times, job.warm_up), Encoder.from_pretrained(job.output / "student"))


def _in_order(dataset: Any, *, batch_size: int, drop_last: bool, **_: Any) -> BatchSampler:
    return BatchSampler(SequentialSampler(dataset), batch_size, drop_last)


def _freeze(model: Any, start: Encoder) -> None:
    """No dropout, and a token table that learns only if the start's does."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = 0.0
    if isinstance(start.backbone, TransformerBackbone):
        learns = start.backbone.model.get_input_embeddings().weight.requires_grad
        model[0].auto_model.get_input_embeddings().requires_grad_(learns)


# tokenlearn


def tokenlearn(job: Job) -> Stepped:
    """Its loop on the same table with a linear layer to the teacher's width; MSE, which is not to be compared.

    It pads with a token of its own, which the table gets a row for.
    """
    from model2vec import StaticModel
    from tokenizers import Tokenizer
    from tokenlearn.pretrain import train_supervised

    assert isinstance(job.start.backbone, StaticTable)
    tokenizer = Tokenizer.from_str(job.start.tokenizer.to_str())
    table = job.start.backbone.folded().cpu()
    if tokenizer.token_to_id("[PAD]") is None:
        tokenizer.add_special_tokens(["[PAD]"])
        table = torch.cat([table, table.mean(dim=0, keepdim=True)])
    model = StaticModel(vectors=table.numpy(), tokenizer=tokenizer)
    rows = job.rows()
    learned = _clocked_texts(job, rows, tokenizer)
    validation = _clocked_texts(job, rows[:1], tokenizer)
    size, rate = job.config.batch_size, job.config.learning_rate
    device = distributed.device().type
    train_supervised(learned, validation, model, device=device, batch_size=size, lr=rate)
    return Stepped(_a_step(learned.times, job.warm_up))


def _clocked_texts(job: Job, rows: np.ndarray, tokenizer: Any) -> Any:
    """tokenlearn's data set; its loop ends, and keeps what it has, at the interrupt that comes after the last step."""
    from tokenlearn.pretrain import TextDataset

    class Texts(TextDataset):
        times: list[float]

        def collate_fn(self, batch: Any) -> Any:
            self.times.append(time.perf_counter())
            if len(self.times) > job.steps:
                raise KeyboardInterrupt
            return TextDataset.collate_fn(batch)

    texts = Texts([job.examples.texts[row] for row in rows], job.vectors(rows), tokenizer)
    texts.times = []
    return texts


def _a_step(times: list[float], warm_up: int) -> float:
    return (times[-1] - times[warm_up]) / (len(times) - 1 - warm_up)


IN_BF16 = "distill, --train.mixed-precision bf16"
TRANSFORMER: dict[str, Callable[[Job], Stepped]] = {
    "distill": ours,
    IN_BF16: in_bf16,
    "sentence-transformers": trainer,
    "sentence-transformers, the same batches, no dropout, frozen table": trainer_alike,
}
STATIC: dict[str, Callable[[Job], Stepped]] = {
    "distill, --train.table-update rows": by_rows,
    "distill": ours,
    "sentence-transformers": trainer,
    "sentence-transformers, the same batches": trainer_alike,
    "tokenlearn": tokenlearn,
}
