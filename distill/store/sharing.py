"""The rows of a store as a Parquet file, for people who have neither the store nor distill."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from distill import files
from distill.errors import IntegrityError
from distill.store.rows import GOOD, text_keys
from distill.store.shards import SHARD_ROWS
from distill.store.vectors import Store


def write_parquet(store: Store, path: str | Path, texts: Sequence[str] | None = None, *, prompt: str = "") -> int:
    """Write `key` (hex) and `embedding` (float16) of every good row, and return how many; the file's metadata says who made them.

    A store keeps no text: give `texts`, and the rows are theirs, in their order, with a column `text`; one that is not
    stored raises IntegrityError. Rows that were set aside (not finite, zero, no tokens) are left out.
    """
    import pyarrow as pa
    from pyarrow import parquet

    rows = np.arange(len(store)) if texts is None else _rows_of(store, texts, prompt)
    good = store.flags[rows] == GOOD
    columns = [] if texts is None else [("text", pa.string())]
    columns += [("key", pa.string()), ("embedding", pa.list_(pa.float16(), store.width))]
    about = {"distill.fingerprint": json.dumps(store.fingerprint), "distill.prompt": prompt}
    schema = pa.schema(columns, metadata=about)
    with files.published_file(Path(path)) as temporary, parquet.ParquetWriter(temporary, schema) as writer:
        for some in _blocks(np.flatnonzero(good)):
            vectors = store.take(rows[some]).numpy().astype(np.float16)
            found = {
                "key": [key.tobytes().hex() for key in store.keys[rows[some]]],
                "embedding": pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), store.width),
            }
            if texts is not None:
                found["text"] = [texts[number] for number in some]
            writer.write_table(pa.table({name: found[name] for name in schema.names}, schema=schema))
    return int(good.sum())


def _rows_of(store: Store, texts: Sequence[str], prompt: str) -> np.ndarray:
    rows = store.find(text_keys(texts, prompt=prompt))
    if missing := int((rows < 0).sum()):
        first = int(np.argmax(rows < 0))
        raise IntegrityError(
            f"{store.path} holds no vector for {missing} of {len(texts)} texts, the first is row {first}: {texts[first][:80]!r}. "
            f"Give the texts that were embedded, and the prompt they were embedded with (now {prompt!r})."
        )
    return rows


def _blocks(numbers: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(numbers), SHARD_ROWS):
        yield numbers[start : start + SHARD_ROWS]
