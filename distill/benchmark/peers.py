"""Other libraries' ways to make a student: the same texts, teacher vectors and wall time, the same start where they take one.

Each runs its own training loop with its own defaults. sentence-transformers' trainer is given batch size, learning rate and precision.
"""

import functools
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from distill import distributed
from distill.encoder import Encoder

# Steps of a first probe, and those of a probe that are left out: the first ones load what is loaded once.
PROBE, WARM_UP = 25, 5


@dataclass(frozen=True, kw_only=True)
class Work:
    """What each way gets. `start` and `teacher` are sentence-transformers folders; `vectors` the teacher's of `texts`."""

    start: Path
    teacher: Path
    texts: list[str]
    vectors: Float[Tensor, "n e"]
    seconds: float
    batch_size: int
    learning_rate: float
    bf16: bool
    seed: int
    output: Path


@dataclass(frozen=True)
class Trained:
    """A student, the wall time of its training, and the steps if the loop counts them."""

    student: Encoder
    seconds: float
    steps: int | None = None


def steps_that_fit(seconds: float, probe: Callable[[int], Sequence[float]]) -> int:
    """How many steps take `seconds`; `probe(steps)` makes some and gives the seconds of each.

    A first probe says how many make a tenth of the time, and where these are more, they are the probe that counts: steps
    of a run of minutes took up to 18 % longer than the first 25.
    """
    step = fmean(probe(PROBE)[WARM_UP:])
    if (more := int(0.1 * seconds / step)) > PROBE:
        step = fmean(probe(more)[WARM_UP:])
    return max(1, int(seconds / step))


# sentence-transformers' trainer


def embed_distill(work: Work) -> Trained:
    """EmbedDistillLoss, cosine."""
    return _sentence_transformers(work, "cosine")


def mse(work: Work) -> Trained:
    """MSELoss, which is EmbedDistillLoss with mse."""
    return _sentence_transformers(work, "mse")


def _sentence_transformers(work: Work, distance: Literal["cosine", "mse"]) -> Trained:
    """A probe finds the steps that fit, since their schedule is one of steps."""

    def probe(steps: int) -> list[float]:
        times, _ = _train_in_trainer(replace(work, seconds=math.inf, output=work.output / "probe"), distance, steps)
        return [0.0, *(after - before for before, after in pairwise(times))]

    steps = steps_that_fit(work.seconds, probe)
    began = time.perf_counter()
    times, model = _train_in_trainer(work, distance, steps)
    seconds = times[-1] - began
    model.save(str(work.output / "student"))
    return Trained(Encoder.from_pretrained(work.output / "student"), seconds, len(times))


def _train_in_trainer(work: Work, distance: Literal["cosine", "mse"], steps: int) -> tuple[list[float], Any]:
    """When each step ended, and the model; nothing runs longer than work.seconds."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(work.start), device=str(distributed.device()))
    times = train_in_trainer(
        model,
        work.texts,
        work.vectors,
        distance=distance,
        seconds=work.seconds,
        output_dir=str(work.output / "trainer"),
        per_device_train_batch_size=work.batch_size,
        learning_rate=work.learning_rate,
        warmup_steps=round(0.1 * steps),
        max_steps=steps,
        bf16=work.bf16,
        seed=work.seed,
    )
    return times, model


def train_in_trainer(
    model: Any,
    texts: list[str],
    vectors: Float[Tensor, "n e"],
    *,
    distance: Literal["cosine", "mse"] = "cosine",
    seconds: float = math.inf,
    **arguments: Any,
) -> list[float]:
    """Train a SentenceTransformer with EmbedDistillLoss in its trainer, for at most `seconds`; when each step ended, by perf_counter.

    `arguments` are those of SentenceTransformerTrainingArguments; it saves and logs nothing, and its rate falls as a cosine.
    """
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer.losses import EmbedDistillLoss

    quiet = {"save_strategy": "no", "logging_strategy": "no", "report_to": "none", "disable_tqdm": True}
    on = {"use_cpu": distributed.device().type == "cpu", "lr_scheduler_type": "cosine"}
    settings = SentenceTransformerTrainingArguments(**{**quiet, **on, **arguments})
    dataset = Dataset.from_dict({"text": texts, "label": vectors.numpy()})
    loss = EmbedDistillLoss(model, distance_metric=distance)
    clock = _clock(seconds)
    SentenceTransformerTrainer(model, settings, train_dataset=dataset, loss=loss, callbacks=[clock]).train()
    return clock.times


def _clock(seconds: float) -> Any:
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.times: list[float] = []

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.times.append(time.perf_counter())
            control.should_training_stop |= self.times[-1] - self.times[0] > seconds

    return Clock()


# model2vec and tokenlearn: static tables of their own, in the teacher's principal directions


def model2vec(work: Work) -> Trained:
    """The teacher's token outputs on 256 principal directions, weighted; no training, and no seed."""
    model, seconds = _model2vec(work.teacher)
    return _saved(model, work, seconds)


def tokenlearn(work: Work) -> Trained:
    """model2vec's table, trained on the principal components of the teacher's vectors until they stop improving or time is up."""
    from tokenlearn.train import train_model

    model, _ = _model2vec(work.teacher)
    torch.manual_seed(work.seed)
    order = torch.randperm(len(work.texts))  # its validation texts are the last ones
    texts, vectors = [work.texts[number] for number in order], work.vectors[order].numpy()
    began = time.perf_counter()
    with _interrupted_after(work.seconds):  # it ends its loop and keeps what it has
        model = train_model(model, texts, vectors, device=distributed.device().type, pca_dims=model.dim)
    return _saved(model, work, time.perf_counter() - began)


@functools.cache
def _model2vec(teacher: Path) -> tuple[Any, float]:
    """With the token weights multiplied into the table, which is what tokenlearn starts from; and the seconds it took."""
    from model2vec import StaticModel
    from model2vec.distill import distill

    began = time.perf_counter()
    model = distill(str(teacher), pca_dims=256, quantize_to="float32", device=distributed.device().type)
    seconds = time.perf_counter() - began
    weights: np.ndarray | None = getattr(model, "weights", None)
    if weights is None:
        return model, seconds
    table = model.embedding * rearrange(weights, "v -> v 1").astype(model.embedding.dtype)
    return StaticModel(vectors=table, tokenizer=model.tokenizer, config=model.config), seconds


def _saved(model: Any, work: Work, seconds: float) -> Trained:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    table = StaticEmbedding(model.tokenizer, embedding_weights=np.ascontiguousarray(model.embedding))
    SentenceTransformer(modules=[table], device="cpu").save(str(work.output / "student"))
    return Trained(Encoder.from_pretrained(work.output / "student"), seconds)


@contextmanager
def _interrupted_after(seconds: float) -> Iterator[None]:
    """As if somebody had pressed Ctrl-C after so long. In the main thread only."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


PEERS: dict[str, Callable[[Work], Trained]] = {
    "sentence-transformers, EmbedDistillLoss": embed_distill,
    "sentence-transformers, MSELoss": mse,
    "model2vec": model2vec,
    "tokenlearn": tokenlearn,
}
