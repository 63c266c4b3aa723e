"""--plan: what a run will need, printed before it is begun."""

import contextlib
import math
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from distill import distributed
from distill.config import StudentConfig
from distill.embed import default_store
from distill.encoder import Encoder
from distill.evaluation import EvaluationData
from distill.narrow import narrow_path
from distill.planning import arithmetic
from distill.planning.rehearsal import ByRole, Speeds, rehearse, some_of, stage
from distill.store import Format, Store, text_keys
from distill.store.shards import MANIFEST
from distill.texts import Texts, texts_by_role
from distill.training import TrainConfig, sampling

Number = int | float  # bytes are whole
Unit = Callable[[Number], str]


def plan(
    teacher: Encoder,
    kind: StudentConfig,
    texts: Texts,
    config: TrainConfig,
    loss: nn.Module,
    data: EvaluationData,
    *,
    store: Path | None = None,
    store_as: str | None = None,
) -> None:
    """Print memory and disk of a run, then, once these are known, its time; nothing is written but a temporary folder.

    `teacher` lies on the CPU; the others are as the run gets them. Nothing is put on the device before the rehearsal, and nothing at all if
    the run does not fit there.
    """
    by_role: ByRole = dict(texts_by_role(texts))
    sample, device = some_of(by_role, config), distributed.device()
    with _temporary() as folder:
        scene = stage(teacher, kind, sample, folder)
        count = sum(len(dict.fromkeys(some)) for some in by_role.values())
        steps = config.steps or max(
            1, round(config.epochs * sampling.steps_per_epoch(count, config.batch_size, config.accumulation))
        )
        stores = _opened(store or default_store(teacher, store_as), kind.space)
        missing = _missing(teacher, kind, by_role, data, stores)
        width = scene.store.width
        memory = arithmetic.memory(teacher, scene.student, scene.examples, loss, config, device, width=width)
        _say(f"Memory on {device}, each process", memory, _bytes)
        vectors = _vectors(teacher, kind, missing, stores, Format.parse(store_as or "float16"))
        files = arithmetic.disk(scene.student, config, steps, world=distributed.world_size())
        _say("Disk", vectors | files, _bytes)
        free = min(distributed.gather_objects(_free(device)))
        if sum(memory.values()) > free:
            _print(f"It does not fit: {_bytes(free)} are free. Try a smaller --train.micro-batch.")
            return
        speeds = rehearse(teacher, scene, loss, config, folder)
        _say(
            f"Time, from a rehearsal of {arithmetic.STEPS} steps", _time(speeds, config, steps, missing, data), _minutes
        )
        _print(f"Most memory of this process in the rehearsal: {_bytes(_most(device))}")


def _free(device: torch.device) -> float:
    """Bytes. On a CPU as many as are asked for: the system lends them, and takes them back from others."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else math.inf


@contextlib.contextmanager
def _temporary() -> Iterator[Path]:
    """One folder for all processes."""
    folder = Path(distributed.main_first(partial(tempfile.mkdtemp, prefix="distill-plan-")))
    try:
        yield folder
        distributed.gather_objects(None)  # nobody reads it any more
    finally:
        if distributed.is_main():
            shutil.rmtree(folder, ignore_errors=True)


def _opened(path: Path, space: int | None) -> list[Store]:
    """The teacher's store and, of a narrower space, the one in it, if they are there."""
    paths = [path] if space is None else [path, narrow_path(path, space)]
    return [Store.open(one) for one in paths if (one / MANIFEST).exists()]


def _missing(
    teacher: Encoder, kind: StudentConfig, texts: ByRole, data: EvaluationData, stores: Sequence[Store]
) -> dict[str, tuple[int, float]]:
    """What the teacher has to compute: texts and their tokens, of the training, of single tokens, of the evaluation."""

    def absent(some: Sequence[str], role: str | None, among: Sequence[Store]) -> list[str]:
        some = list(dict.fromkeys(some))
        lacked = _lacked(among, text_keys(some, prompt=teacher.prompt(role)))
        return [text for text, lacks in zip(some, lacked, strict=True) if lacks]

    def counted(by_role: ByRole, among: Sequence[Store]) -> tuple[int, float]:
        left = {role: absent(some, role, among) for role, some in by_role.items()}
        return sum(map(len, left.values())), sum(_tokens(teacher, some, role) for role, some in left.items())

    names = [str(token) for token in range(len(teacher.tokenizer))] if kind.kind in ("static", "tiny") else []
    tokens = int(_lacked(stores, text_keys(names, kind="token")).sum())
    single = tokens, float(tokens * (1 + teacher.special_token_count))
    return {
        "teacher's vectors of the texts": counted(texts, stores[:1]),
        "teacher's vectors of single tokens": single,
        "teacher's vectors for the evaluation": counted(data.by_role(), stores),
    }


def _tokens(teacher: Encoder, texts: Sequence[str], role: str | None) -> float:
    """Tokens of texts, from 4,096 of them at most."""
    some = texts[:: -(-len(texts) // 4096)] if texts else []
    lengths = teacher.tokenize(some, prompt=teacher.prompt(role)).tokens.lengths
    return float(lengths.sum()) * len(texts) / max(1, len(some))


def _lacked(stores: Sequence[Store], keys: np.ndarray) -> np.ndarray:
    """Which keys are in none of the stores."""
    return np.all([np.ones(len(keys), bool), *(one.find(keys) < 0 for one in stores)], axis=0)


def _vectors(
    teacher: Encoder,
    kind: StudentConfig,
    missing: Mapping[str, tuple[int, float]],
    stores: Sequence[Store],
    form: Format,
) -> dict[str, int]:
    """Bytes of vectors. For a narrower space the teacher's own are those of the texts, and every row is turned."""
    rows = [count for count, _ in missing.values()]
    if kind.space is None:
        return {"teacher vectors": arithmetic.vectors(sum(rows), teacher.width, form)}
    stored = int(_lacked(stores[1:], stores[0].keys).sum()) if stores else 0
    return {
        "teacher vectors": arithmetic.vectors(rows[0], teacher.width, form),
        "narrow vectors": arithmetic.vectors(stored + sum(rows), kind.space, Format()),
    }


def _time(
    speeds: Speeds,
    config: TrainConfig,
    steps: int,
    missing: Mapping[str, tuple[int, float]],
    data: EvaluationData,
) -> dict[str, float]:
    """Seconds by what is done; the teacher's and the evaluation's work is shared by the processes."""
    world = distributed.world_size()
    teacher = {f"{name}: {count:,}": tokens * speeds.teacher_token / world for name, (count, tokens) in missing.items()}
    saves = -(-steps // (config.save_every or max(1, steps // 10)))
    read = sum(len(some) for some in data.by_role().values())
    return {
        **teacher,
        f"training: {steps:,} steps, {saves} checkpoints": steps * speeds.step + saves * speeds.checkpoint,
        f"evaluation of start and student: {read:,} texts": 2 * read * speeds.student_text / world,
    }


def _most(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# What is shown


def _say(title: str, terms: Mapping[str, Number], unit: Unit) -> None:
    cells = {**{name: unit(value) for name, value in terms.items()}, "together": unit(sum(terms.values()))}
    width, right = max(map(len, cells)), max(map(len, cells.values()))
    lines = [f"  {name:<{width}}  {cell:>{right}}" for name, cell in cells.items()]
    _print("\n".join(["", title, *lines]))


def _print(text: str) -> None:
    if distributed.is_main():
        print(text, flush=True)


def _bytes(count: Number) -> str:
    power = 3 if count >= 1e10 else 2 if count >= 1e6 else 1
    return f"{count / 1000**power:,.1f} {('kB', 'MB', 'GB')[power - 1]}"


def _minutes(seconds: Number) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes:,} min {rest:02d} s" if minutes else f"{seconds:.1f} s"
