"""The temperature of a run, from the stored teacher vectors that it is trained on."""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from distill import distributed, files
from distill.errors import RecipeError
from distill.losses import calibrate_temperature
from distill.store import Store
from distill.training import sampling
from distill.training.examples import Examples


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A temperature, and what it was found for."""

    temperature: float
    perplexity: float
    columns: int
    texts: str
    teacher: str

    def __str__(self) -> str:
        return (
            f"temperature {self.temperature:.4g}: there a row of the teacher has perplexity {self.perplexity:g} over "
            f"{self.columns:,} texts"
        )


def calibrate(data: Examples, store: Store, *, perplexity: float, columns: int, seed: int, output: Path) -> Calibration:
    """`calibrate_temperature` on as many of the training's vectors as a step has columns: its batch and its bank.

    The same on every process. OUTPUT/temperature.json keeps it, and a later run there reads it back if it would be found
    for the same texts, teacher and perplexity: a resumed run has the same temperature to the last digit.
    """
    path = output / "temperature.json"
    return Calibration(**distributed.main_first(partial(_calibrate, data, store, perplexity, columns, seed, path)))


def _calibrate(data: Examples, store: Store, perplexity: float, columns: int, seed: int, path: Path) -> dict[str, Any]:
    chosen = sampling.permutation(seed, 0, len(data))[:columns]
    keys = data.keys[torch.from_numpy(chosen)]
    found_for = {
        "perplexity": perplexity,
        "columns": len(chosen),
        "texts": files.digest(keys.numpy().tobytes())[:12],
        "teacher": store.digest,
    }
    kept = _read(path)
    if {name: kept.get(name) for name in found_for} == found_for:
        return kept
    vectors = store.take(data.rows[chosen]).to(distributed.device())
    try:
        found = calibrate_temperature(vectors, perplexity=perplexity, keys=keys.to(vectors.device))
    except ValueError as error:
        raise RecipeError(f"the texts to train on give no temperature: {error}") from error
    value = {"temperature": found, **found_for}
    files.write_json(path, value)
    return value


def _read(path: Path) -> dict[str, Any]:
    """What is there; nothing, if it is damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
