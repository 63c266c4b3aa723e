"""What tests of embedding and training share, callable in a spawned process: texts, a tiny teacher, small runs."""

import importlib.util
import math
import random
import sys
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import tiny
import torch
from torch import nn

from distill import losses, students
from distill.embed import embed
from distill.encoder import Encoder
from distill.modules import TransformerBackbone
from distill.store import Store
from distill.training import Examples, Run, TrainConfig, match, train

RECIPES = Path(__file__).parents[1] / "recipes"
WORDS = sorted({word.strip(".,?") for sentence in tiny.SENTENCES for word in sentence.split()})


def texts(count: int, longest: int = 12) -> list[str]:
    """Distinct texts of 1 to `longest` words and a number, the same in every process."""
    draw = random.Random(5)
    return [" ".join([*draw.choices(WORDS, k=draw.randint(1, longest)), str(number)]) for number in range(count)]


def teacher(folder: str | Path) -> Encoder:
    return Encoder.from_pretrained(folder)


def student(kind: str, of: Encoder, dropout: float = 0.0) -> Encoder:
    """ "static", or "layers": two of the teacher's, with its dropout set."""
    torch.manual_seed(1)
    if kind == "static":
        return students.static(of, width=16)
    made = students.keep_layers(of, 2, projection=True)
    assert isinstance(made.backbone, TransformerBackbone)
    for module in made.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = dropout
    return made


LOSSES = {
    "cosine": losses.CosineDistance,
    "contrastive": losses.CrossContrastive,
    "gram": losses.GramKL,
    "no bank": lambda: losses.WeightedSum({"cosine": losses.CosineDistance(), "gram": losses.GramMSE()}),
    "sum": lambda: losses.WeightedSum(
        {"kl": losses.CrossKL(), "gram": losses.GramMSE()}, {"kl": losses.linear_decay(1.0), "gram": 1.0}
    ),
}


def prepared(
    model: str | Path, path: str | Path, count: int, kind: str = "layers", dropout: float = 0.0
) -> tuple[Encoder, Examples, Store]:
    """A student, what it is trained on, and the store."""
    of = teacher(model)
    stored = embed(texts(count), of, Path(path))
    one = student(kind, of, dropout)
    return one, match(texts(count), one, of, stored), stored


def small_run(
    model: str | Path,
    output: str | Path,
    *,
    store: str | Path,
    count: int = 40,
    kind: str = "layers",
    loss: str = "contrastive",
    dropout: float = 0.0,
    dtype: torch.dtype = torch.float32,
    seconds: float = math.inf,
    **config: Any,
) -> Run:
    """A run of some steps on tiny models; `config` are fields of TrainConfig."""
    one, data, stored = prepared(model, store, count, kind, dropout)
    one.to(dtype)
    options: dict[str, Any] = {"batch_size": 8, "epochs": 1.0, "dropout": dropout > 0} | config
    return train(one, data, stored, LOSSES[loss](), TrainConfig(**options), output=Path(output), seconds=seconds)


def weights(run: Run) -> dict[str, np.ndarray]:
    return {name: value.cpu().numpy() for name, value in run.student.state_dict().items()}


@cache
def recipe_module(name: str) -> ModuleType:
    """recipes/NAME.py, as a module."""
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", RECIPES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def waits_for_the_device(action: Callable[[], object]) -> int:
    """How often an action makes the host wait for the CUDA device."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            action()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in seen)
