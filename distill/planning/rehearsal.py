"""A run in little: the student that it will train, on vectors that stand for the teacher's, and how fast both are."""

import io
import time
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from torch import Tensor, nn

from distill import distributed, runlog, students
from distill.config import StudentConfig
from distill.embed.job import BATCH_TOKENS
from distill.encoder import Encoder
from distill.modules import Tokens
from distill.planning.arithmetic import STEPS
from distill.store import GOOD, Rows, Store, text_keys
from distill.store.compression import spread
from distill.training import Examples, TrainConfig, match, train

SAMPLE_TEXTS = 65_536  # at most, of all roles
WARM_UP = 5  # steps that are left out of the time
TEACHER_TOKENS = {"cpu": 2048}  # that tell a teacher's speed; on other devices as follows
TEACHER_TOKENS_ELSEWHERE = 131_072

ByRole = Mapping[str | None, Sequence[str]]


@dataclass(frozen=True)
class Stage:
    """What a rehearsal runs on: some of the texts by role, and the student with what it learns from, all on the CPU."""

    texts: dict[str | None, list[str]]
    store: Store
    student: Encoder
    examples: Examples


@dataclass(frozen=True)
class Speeds:
    """Seconds: of the teacher a token, of a step, of a checkpoint, of the student a text."""

    teacher_token: float
    step: float
    checkpoint: float
    student_text: float


def some_of(texts: ByRole, config: TrainConfig) -> dict[str | None, list[str]]:
    """Some of the texts of each role, evenly spaced: enough for the steps and the bank of a rehearsal."""
    wanted = min(SAMPLE_TEXTS, max(4096, config.bank_size, STEPS * config.batch_size * config.accumulation))
    total = sum(map(len, texts.values()))
    shares = {role: min(len(some), -(-wanted * len(some) // max(1, total))) for role, some in texts.items()}
    return {role: [some[i] for i in spread(len(some), shares[role])] for role, some in texts.items()}


def stage(teacher: Encoder, kind: StudentConfig, texts: dict[str | None, list[str]], folder: Path) -> Stage:
    """Build the student on vectors drawn at random: it has the shape of the one that the run will train.

    Where its layers are to be chosen by the teacher's vectors, which takes minutes, it has as many others.
    """
    if kind.layers == "auto" and kind.name is None:
        kind = replace(kind, layers=tuple(students.layer_numbers(teacher, kind.depth or 3)), depth=None)
    tokens = len(teacher.tokenizer) if kind.kind in ("static", "tiny") else 0
    distributed.main_first(partial(_random_store, folder / "store", teacher, texts, tokens))
    store = Store.open(folder / "store")
    given = _as_given(texts)
    with redirect_stdout(io.StringIO()):  # what a fit says of random vectors means nothing
        space = kind.enter(teacher, store, given)
        student = kind.build(space.teacher, space.store, given)
    return Stage(texts, space.store, student, match(given, student, space.teacher, space.store))


def rehearse(teacher: Encoder, scene: Stage, loss: nn.Module, config: TrainConfig, folder: Path) -> Speeds:
    """Some tokens through the teacher, 20 steps and a checkpoint, some texts through the student, on this process's device."""
    device = distributed.device()
    a_token = _teacher_token(teacher.to(device), scene.texts)
    steps = replace(config, steps=STEPS, save_every=STEPS, resume=False, trackers=(), hard_stage=None)
    run = train(scene.student, scene.examples, scene.store, loss, steps, output=folder / "run")
    seconds = [step["seconds"] for step in runlog.read(folder / "run" / runlog.NAME)]
    some = scene.examples.texts[:256]
    began = time.perf_counter()
    run.student.encode(some)
    a_text = (time.perf_counter() - began) / len(some)
    return Speeds(a_token, fmean(seconds[WARM_UP:]), max(0.0, run.seconds - sum(seconds)), a_text)


def _as_given(texts: dict[str | None, list[str]]) -> list[str] | dict[str, list[str]]:
    """As recipes hand texts on: alone, or by role."""
    return texts[None] if None in texts else {str(role): some for role, some in texts.items()}


def _random_store(path: Path, teacher: Encoder, texts: dict[str | None, list[str]], tokens: int) -> None:
    store = Store.open_or_create(path, teacher.fingerprint(), teacher.width)
    keys = [text_keys(list(dict.fromkeys(some)), prompt=teacher.prompt(role)) for role, some in texts.items()]
    keys.append(text_keys([str(token) for token in range(tokens)], kind="token"))
    for some in keys:
        new = some[store.find(some) < 0]
        vectors = torch.randn(len(new), teacher.width, generator=torch.Generator().manual_seed(0))
        rows = Rows(vectors.numpy(), new, np.ones(len(new), np.int32), np.full(len(new), GOOD, np.uint8))
        store.publish(store.append(rows))


@torch.inference_mode()
def _teacher_token(teacher: Encoder, texts: dict[str | None, list[str]]) -> float:
    """Seconds a token, of texts of all lengths in batches as embed() makes them."""
    everything = [teacher.prompt(role) + text for role, some in texts.items() for text in some[:4096]]
    tokens = teacher.tokenize(everything).tokens
    wanted = TEACHER_TOKENS.get(teacher.device.type, TEACHER_TOKENS_ELSEWHERE)
    order = tokens.lengths.argsort()
    count = max(1, min(len(order), int(wanted / tokens.lengths.double().mean().clamp(min=1))))
    some = tokens.rows(order[torch.linspace(0, len(order) - 1, count).long()])
    _compute(teacher, some.rows(torch.arange(max(1, count // 8))))
    began = time.perf_counter()
    _compute(teacher, some)
    return (time.perf_counter() - began) / max(1, int(some.lengths.sum()))


def _compute(teacher: Encoder, tokens: Tokens) -> list[Tensor]:
    return [teacher.compute(group).cpu() for _, group in tokens.grouped(BATCH_TOKENS)]
