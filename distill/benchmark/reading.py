"""Some of many stored vectors, as a training draws them: from distill's store, and from the formats that others use.

Each way is written from float16 vectors (n, e), and gives a call that reads rows by number as a float32 tensor; one of
distill's leaves them in float16, in which they go to a GPU.
"""

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from distill.store import GOOD, Rows, Store
from distill.store.shards import SHARD_ROWS
from distill.store.writing import write_store

Read = Callable[[np.ndarray], Float[Tensor, "k e"]]
OURS = "distill, Store.take"


def draw(rows: int, width: int) -> np.ndarray:
    """Vectors (rows, width), float16."""
    generator = np.random.Generator(np.random.PCG64(0))
    vectors = np.empty((rows, width), np.float16)
    for start in range(0, rows, SHARD_ROWS):
        part = vectors[start : start + SHARD_ROWS]
        part[:] = generator.standard_normal(part.shape, np.float32)
    return vectors


def store(vectors: np.ndarray, folder: Path) -> Read:
    return _written(vectors, folder / "store").take


def store_as_it_is(vectors: np.ndarray, folder: Path) -> Read:
    return _written(vectors, folder / "store-as-it-is").take_stored


def _written(vectors: np.ndarray, folder: Path) -> Store:
    return write_store(folder, {}, vectors.shape[1], _blocks(vectors), rows=len(vectors))


def _blocks(vectors: np.ndarray) -> Iterator[Rows]:
    for start in range(0, len(vectors), SHARD_ROWS):
        part = vectors[start : start + SHARD_ROWS]
        numbers = np.arange(start, start + len(part), dtype=np.uint64)
        keys = np.stack([numbers, numbers], axis=1)
        yield Rows(part, keys, np.ones(len(part), np.int32), np.full(len(part), GOOD, np.uint8))


def npy(vectors: np.ndarray, folder: Path) -> Read:
    np.save(folder / "vectors.npy", vectors)
    mapped = np.load(folder / "vectors.npy", mmap_mode="r", allow_pickle=False)
    return lambda rows: torch.from_numpy(mapped[rows]).float()


def arrow(vectors: np.ndarray, folder: Path) -> Read:
    """A column of lists of one length in an IPC file, by record batches of a shard's size, memory-mapped."""
    import pyarrow

    path = str(folder / "vectors.arrow")
    column = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(vectors.reshape(-1)), vectors.shape[1])
    table = pyarrow.table({"vector": column})
    with pyarrow.OSFile(path, "wb") as file, pyarrow.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=SHARD_ROWS)
    mapped: Any = pyarrow.ipc.open_file(pyarrow.memory_map(path)).read_all().column("vector")

    def read(rows: np.ndarray) -> Tensor:
        flat = mapped.take(pyarrow.array(rows)).combine_chunks().flatten().to_numpy()
        return torch.from_numpy(flat.reshape(len(rows), -1)).float()

    with warnings.catch_warnings():  # torch says once that Arrow's memory is not to be written; it is copied at once
        warnings.simplefilter("ignore")
        read(np.zeros(1, np.int64))
    return read


def datasets(vectors: np.ndarray, folder: Path) -> Read:
    """A data set on disk, memory-mapped, that gives torch tensors."""
    from datasets import Dataset, load_from_disk

    Dataset.from_dict({"vector": vectors}).save_to_disk(folder / "dataset")
    mapped: Any = load_from_disk(str(folder / "dataset")).with_format("torch")
    return lambda rows: mapped[rows]["vector"].float()


WAYS: dict[str, Callable[[np.ndarray, Path], Read]] = {
    OURS: store,
    "distill, as float16": store_as_it_is,
    "npy memmap": npy,
    "Arrow take": arrow,
    "datasets": datasets,
}
