"""--plan: what a run will need, printed before it is begun."""

import contextlib
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn

from distill import distributed
from distill.config import StudentConfig
from distill.embed import default_store
from distill.encoder import Encoder
from distill.evaluation import EvaluationData
from distill.planning import arithmetic
from distill.planning.rehearsal import Speeds, Stage, Texts, rehearse, some_of, stage
from distill.store import Format, Store, text_keys
from distill.store.shards import MANIFEST
from distill.training import TrainConfig, sampling

Number = int | float  # bytes are whole
Unit = Callable[[Number], str]


def plan(
    teacher: Encoder,
    kind: StudentConfig,
    texts: Sequence[str] | Mapping[str, Sequence[str]],
    config: TrainConfig,
    loss: nn.Module,
    data: EvaluationData,
    *,
    store: Path | None = None,
    store_as: str | None = None,
) -> None:
    """Print memory and disk of a run, then, once these are known, its time; nothing is written but a temporary folder.

    `teacher` lies on the CPU; the others are as the run gets them. The device
    is first touched for the rehearsal, and not at all if the run does not fit on it.
    """
    by_role: Texts = dict(texts.items()) if isinstance(texts, Mapping) else {None: texts}
    sample, device = some_of(by_role, config), distributed.device()
    with _temporary() as folder:
        scene = stage(teacher, kind, sample, folder)
        count = sum(len(dict.fromkeys(some)) for some in by_role.values())
        steps = config.steps or max(
            1, round(config.epochs * sampling.steps_per_epoch(count, config.batch_size, config.accumulation))
        )
        missing = _missing(teacher, kind, by_role, data, store, store_as)
        memory = arithmetic.memory(teacher, scene.student, scene.examples, loss, config, device)
        _say(f"Memory on {device}, each process", memory, _bytes)
        _say("Disk", _disk(scene, config, steps, missing, teacher, store_as), _bytes)
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
        if free is not None and sum(memory.values()) > free:
            _print(f"It does not fit: {_bytes(free)} are free. Try a smaller --train.micro-batch.")
            return
        speeds = rehearse(teacher, scene, loss, config, folder)
        _say(
            f"Time, from a rehearsal of {arithmetic.STEPS} steps", _time(speeds, config, steps, missing, data), _minutes
        )
        _print(f"Most memory of this process in the rehearsal: {_bytes(_most(device))}")


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


def _missing(
    teacher: Encoder, kind: StudentConfig, texts: Texts, data: EvaluationData, store: Path | None, store_as: str | None
) -> dict[str, tuple[int, float]]:
    """What the teacher has to compute: texts and their tokens, of the training, of single tokens, of the evaluation."""
    path = store or default_store(teacher, store_as)
    opened = Store.open(path) if (path / MANIFEST).exists() else None

    def absent(some: Sequence[str], role: str | None) -> list[str]:
        some = list(dict.fromkeys(some))
        if opened is None:
            return some
        found = opened.find(text_keys(some, prompt=teacher.prompt(role)))
        return [text for text, row in zip(some, found, strict=True) if row < 0]

    def counted(by_role: Texts) -> tuple[int, float]:
        left = {role: absent(some, role) for role, some in by_role.items()}
        return sum(map(len, left.values())), sum(_tokens(teacher, some, role) for role, some in left.items())

    names = [str(token) for token in range(len(teacher.tokenizer))] if kind.kind in ("static", "tiny") else []
    if opened is not None and names:
        names = names[: int((opened.find(text_keys(names, kind="token")) < 0).sum())]
    single = len(names), float(len(names) * (1 + teacher.special_token_count))
    return {
        "teacher's vectors of the texts": counted(texts),
        "teacher's vectors of single tokens": single,
        "teacher's vectors for the evaluation": counted(data.by_role()),
    }


def _tokens(teacher: Encoder, texts: Sequence[str], role: str | None) -> float:
    """Tokens of texts, from 4,096 of them at most."""
    some = texts[:: -(-len(texts) // 4096)] if texts else []
    lengths = teacher.tokenize(some, prompt=teacher.prompt(role)).tokens.lengths
    return float(lengths.sum()) * len(texts) / max(1, len(some))


def _disk(
    scene: Stage,
    config: TrainConfig,
    steps: int,
    missing: Mapping[str, tuple[int, float]],
    teacher: Encoder,
    store_as: str | None,
) -> dict[str, int]:
    rows, form = sum(count for count, _ in missing.values()), Format.parse(store_as or "float16")
    world = distributed.world_size()
    return arithmetic.disk(scene.student, config, steps, rows=rows, width=teacher.width, form=form, world=world)


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
