"""Hard negatives: the texts that the teacher itself places nearest to a text, found once and kept beside its vectors."""

import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from distill import distributed, files
from distill.similarity import cosine_similarity_matrix
from distill.store import Store
from distill.training.examples import Examples

ROWS = 4096  # of a block of the matrix, each way


def hard_neighbours(
    data: Examples, store: Store, *, count: int, margin: float, device: torch.device | None = None
) -> np.ndarray:
    """Rows of the `count` nearest other texts of each text, (n, count) int32, the nearest first; -1 where there are no more.

    Nearest by the cosine of the teacher's vectors. A text of the same key is left out, and so is one with a cosine above
    `margin`: it says the same, and would be a false negative. Exact, 2 n^2 e FLOP, shared among the processes; some 200 MB
    in each (blocks of 4,096 x 4,096 cosines) and reads the vectors n / 4,096 times. The result is kept in the store's folder, as
    neighbours-DIGEST.safetensors for the digest of texts, teacher, count and margin: a second run reads it.
    """
    path = store.path / f"neighbours-{_digest(data, store, count, margin)}.safetensors"
    kept = distributed.main_first(partial(_read, path, len(data), count))
    if kept is not None:
        return kept
    found = distributed.everywhere(partial(_own_blocks, data, store, count, margin, device or torch.device("cpu")))
    blocks = {start: rows for part in found for start, rows in part.items()}
    neighbours = np.concatenate([blocks[start] for start in sorted(blocks)])
    distributed.main_first(partial(_write, store, path, neighbours))
    return neighbours


def _digest(data: Examples, store: Store, count: int, margin: float) -> str:
    found_for = {
        "texts": files.digest(data.keys.numpy().tobytes()),
        "teacher": store.fingerprint,  # the file lies in the store, so that its form needs no name
        "count": count,
        "margin": margin,
    }
    return files.digest(json.dumps(found_for, sort_keys=True).encode())[:24]


def _own_blocks(data: Examples, store: Store, count: int, margin: float, device: torch.device) -> dict[int, np.ndarray]:
    """This process's blocks of texts, by their first row. A block is the same whoever computes it."""
    starts = range(0, len(data), ROWS)[distributed.rank() :: distributed.world_size()]
    bar = tqdm(starts, desc="neighbours", unit="block", delay=2, disable=distributed.hides_bars())
    return {start: _block(data, store, start, count, margin, device) for start in bar}


@torch.no_grad()
def _block(data: Examples, store: Store, start: int, count: int, margin: float, device: torch.device) -> np.ndarray:
    """Neighbours of one block of texts among all: the best so far are kept while the blocks of columns pass by."""
    queries, keys = _taken(data, store, start, device)
    best = torch.full((len(queries), count), -torch.inf, device=device)
    rows = torch.full((len(queries), count), -1, device=device)
    for first in range(0, len(data), ROWS):
        columns, column_keys = _taken(data, store, first, device)
        cosines = cosine_similarity_matrix(queries, columns)
        same = rearrange(keys, "q -> q 1") == column_keys
        cosines.masked_fill_(same | (cosines > margin), -torch.inf)
        top = cosines.topk(min(count, len(columns)))
        values, places = torch.cat([best, top.values], dim=1), torch.cat([rows, first + top.indices], dim=1)
        best, kept = values.topk(count)
        rows = places.gather(1, kept)
    return rows.masked_fill(best == -torch.inf, -1).int().cpu().numpy()


def _taken(data: Examples, store: Store, start: int, device: torch.device) -> tuple[Tensor, Tensor]:
    place = slice(start, start + ROWS)
    return store.take(data.rows[place]).to(device), data.keys[place].to(device)


def _read(path: Path, texts: int, count: int) -> np.ndarray | None:
    """What is there; None, if it is not what was written."""
    try:
        rows = load_file(path)["neighbours"]
    except (OSError, KeyError, SafetensorError):
        return None
    whole = rows.shape == (texts, count) and rows.dtype == np.int32 and rows.min() >= -1 and rows.max() < texts
    return rows if whole else None


def _write(store: Store, path: Path, neighbours: np.ndarray) -> None:
    try:
        with store.lock(), files.published_file(path) as temporary:
            save_file({"neighbours": neighbours}, temporary)
    except OSError as error:
        print(f"{path} cannot be written ({error}); another run finds the neighbours anew.", file=sys.stderr)
