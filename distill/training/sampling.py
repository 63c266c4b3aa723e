"""Which rows a step of a run sees: a function of seed and step alone, the same on every process and after a resume."""

from functools import lru_cache

import numpy as np

BANK = 1  # the stream of banks: apart from the order of texts, of this seed and of any other


def steps_per_epoch(count: int, batch_size: int, accumulation: int) -> int:
    return -(-count // (batch_size * accumulation))


def batches(step: int, count: int, *, batch_size: int, accumulation: int, seed: int) -> list[np.ndarray]:
    """The global batches of a step: the next rows of permutation(seed, epoch); the last of an epoch may be smaller."""
    epoch, place = divmod(step, steps_per_epoch(count, batch_size, accumulation))
    each = batch_size * accumulation
    rows = permutation(seed, epoch, count)[place * each : (place + 1) * each]
    return [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]


def bank_rows(draw: int, count: int, *, size: int, seed: int) -> np.ndarray:
    """The draw-th window of `size` rows of a permutation: no row twice in it. What fills no window is skipped until the next one."""
    size = min(size, count)
    epoch, window = divmod(draw, count // size)
    return permutation(seed, epoch, count, BANK)[window * size : (window + 1) * size]


def hard_bank_rows(batch: np.ndarray, neighbours: np.ndarray, window: np.ndarray) -> np.ndarray:
    """The nearest neighbours of all of the batch's texts, then the second nearest, and so on; what is left of the bank is `window`'s.

    `neighbours` (n, k) has the rows of each text's neighbours, -1 for none. As many rows as the window, none twice; no
    neighbour is in the batch.
    """
    near = neighbours[batch].T.ravel()
    near = near[(near >= 0) & ~np.isin(near, batch)]
    candidates = np.concatenate([near, window])
    _, first = np.unique(candidates, return_index=True)
    return candidates[np.sort(first)][: len(window)]


@lru_cache(maxsize=4)  # an epoch's order of texts and of bank rows, and the next ones: 8 bytes a text each
def permutation(seed: int, epoch: int, count: int, *stream: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64([seed, epoch, *stream])).permutation(count)
