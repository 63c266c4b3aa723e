"""Whether a store's vectors are an encoder's, where the hash of its configuration alone says that they are not.

The fingerprint hashes the configuration as transformers writes it, and another release may write the same one in other
words. Then the vectors decide: some of the stored texts are computed again. If each is what is stored, the store is taken,
and its manifest remembers the other hash; its fingerprint stays, so that runs which were begun on it go on.
"""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from jaxtyping import Float
from torch import Tensor

from distill.encoder import Encoder
from distill.errors import IntegrityError
from distill.modules import eval_mode
from distill.store import GOOD, Store, compression, shards
from distill.store.vectors import differing_fields

SAMPLE_ROWS = 32
# |computed - stored| / |stored| that rounding explains, both as the store rounds them: 1e-6 by other batches or another
# device in float32. Another attention, activation or rotary base moves vectors by 1e-3 and more. In a compressed store some
# rows were rounded to float16 first: now and then a column falls on the other side of a step.
ROUNDING = {"float32": 1e-4, "bfloat16": 2e-2}
STEPS = {"float16": 1e-3, "int8": 1e-2}

Compute = Callable[[list[int]], Float[Tensor, "n e"]]


def recognize(path: Path, teacher: Encoder, own: dict[str, Any], keys: np.ndarray, compute: Compute) -> bool:
    """Whether the store at `path` is `teacher`'s, by its fingerprint or, where only `config` differs, by its vectors.

    `own` is the teacher's fingerprint, which takes a second to make; `compute` gives its vectors of texts by their numbers in
    `keys`. False if there is no store or it is not whole, if anything else differs, if none of the texts is stored, or if a
    vector differs. Cost: 32 texts, once a store and description.
    """
    if not (path / shards.MANIFEST).exists():
        return False
    try:
        manifest = shards.read_manifest(path)
        fields = differing_fields(manifest.fingerprint, own, manifest.equal_configs)
        if fields != ["config"]:
            return not fields
        store = Store.open(path)
    except IntegrityError:
        return False
    rows = store.find(keys)
    known = np.flatnonzero(rows >= 0)
    known = known[store.flags[rows[known]] == GOOD]
    known = known[compression.spread(len(known), SAMPLE_ROWS)]
    if not len(known):
        return False
    difference = _difference(store, rows[known], compute(known.tolist()))
    form = store.codec.format
    if not difference <= ROUNDING[teacher.compute_dtype] + (STEPS[form.dtype] if form.compressed else 0.0):
        return False
    _remember(path, str(own["config"]))
    print(
        f"{path}: the configuration of {teacher.name} is described in other words than when it was made; {len(known)} of its "
        f"vectors were computed again and are the same (to {difference:.0e}), so it is used.",
        file=sys.stderr,
    )
    return True


def computing(teacher: Encoder, texts: Sequence[str], role: str | None) -> Compute:
    """Vectors of some of `texts`, by number."""
    return lambda numbers: teacher.encode([texts[number] for number in numbers], role=role)


def computing_tokens(teacher: Encoder) -> Compute:
    """Vectors of single tokens, by their id."""

    @torch.inference_mode()
    def compute(numbers: list[int]) -> Float[Tensor, "n e"]:
        with eval_mode(teacher):
            return teacher.compute(teacher.single_tokens(numbers)).cpu()

    return compute


def _difference(store: Store, rows: np.ndarray, vectors: Float[Tensor, "n e"]) -> float:
    """The largest of |computed - stored| / |stored|, both as the store rounds them."""
    stored = store.take(rows)
    rounded = store.codec.decode(store.codec.encode(vectors.numpy()).astype(np.float32))
    distances = np.linalg.norm(rounded - stored.numpy(), axis=1) / np.linalg.norm(stored.numpy(), axis=1)
    return float(distances.max()) if np.isfinite(distances).all() else math.inf


def _remember(path: Path, config: str) -> None:
    """So that it is asked once. A store that cannot be written is asked each time."""
    try:
        with FileLock(path / ".lock"):
            manifest = shards.read_manifest(path)
            if config not in manifest.equal_configs:
                equal = (*manifest.equal_configs, config)
                shards.write_manifest(path, replace(manifest, equal_configs=equal))
    except OSError:
        return
