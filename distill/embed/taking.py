"""Vectors that somebody has already, of an index say, as a teacher's store."""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from distill.data import load_texts
from distill.embed.places import prepare
from distill.encoder import Encoder, require_encoder
from distill.errors import DataError, IntegrityError, RecipeError, reported
from distill.identity import computing
from distill.similarity import pairwise_cosine, usable_rows
from distill.store import FLAG_NAMES, Rows, Store, text_keys
from distill.store.rows import flags_of
from distill.store.shards import SHARD_ROWS, Shard
from distill.texts import refuse_what_is_no_text

MAGIC = b"\x93NUMPY"  # what a .npy file begins with


def import_vectors(
    texts: Sequence[str],
    vectors: np.ndarray,
    teacher: Encoder,
    path: str | Path,
    *,
    role: str | None = None,
    checked: int = 32,
    least_cosine: float = 0.999,
) -> Store:
    """Take vectors (n, e) that you already have, of an index say, into a store.

    At most `checked` texts, half of them evenly spaced, half drawn, are embedded by the teacher and compared: IntegrityError names
    the worst if its cosine is below `least_cosine`, since vectors of another model, prompt or max_length would teach the
    wrong space.
    """
    require_encoder(teacher, "import_vectors")
    if checked < 1:
        raise RecipeError(f"1 text or more is checked against the teacher, got {checked}.")
    if not texts or vectors.shape != (len(texts), teacher.width):
        raise DataError(
            f"{len(texts):,} texts and vectors of shape {vectors.shape}; expected ({max(len(texts), 1)}, {teacher.width})."
        )
    refuse_what_is_no_text(texts)
    prompt = teacher.prompt(role)
    _refuse_foreign(texts, vectors, teacher, role, checked, least_cosine)
    keys = text_keys(texts, prompt=prompt)
    _, first = np.unique(keys, axis=0, return_index=True)
    with prepare(Path(path), teacher, keys, computing(teacher, texts, role)).lock():
        store = Store.open(path)  # as it is now: another process may have written while this one waited
        new = np.sort(first[store.find(keys[first]) < 0])
        store.require_space(len(new))
        written: list[Shard] = []
        for start in range(0, len(new), SHARD_ROWS):
            part = new[start : start + SHARD_ROWS]
            tokenized = teacher.tokenize([texts[i] for i in part], prompt=prompt)
            flags = flags_of(vectors[part], np.array(tokenized.empty))
            written += store.append(Rows(vectors[part], keys[part], tokenized.tokens.lengths.numpy(), flags))
        store.publish(written)
    return store


def _refuse_foreign(
    texts: Sequence[str], vectors: np.ndarray, teacher: Encoder, role: str | None, checked: int, least_cosine: float
) -> None:
    """Compare some of the vectors with what the teacher gives; rows that will be set aside anyway say nothing."""
    spaced = np.linspace(0, len(texts) - 1, min(-(-checked // 2), len(texts))).astype(int)
    sample = np.union1d(spaced, np.random.default_rng(0).integers(len(texts), size=checked // 2))
    theirs = torch.from_numpy(vectors[sample].astype(np.float32))
    usable = usable_rows(theirs)
    if not usable.any():
        raise DataError(f"none of {len(sample)} vectors that were looked at is finite and not zero.")
    sample, theirs = sample[usable.numpy()], theirs[usable]
    own = teacher.encode([texts[i] for i in sample], role=role)
    agreement = pairwise_cosine(own, theirs)
    if not (agreement >= least_cosine).all():
        worst = int(agreement.nan_to_num(-2).argmin())
        raise IntegrityError(
            f"row {sample[worst]} ({texts[sample[worst]][:60]!r}) has cosine {agreement[worst]:.4f} to what {teacher.name} gives for it "
            f"(max_length {teacher.max_length}, prompt {teacher.prompt(role)!r}); at least {least_cosine} is asked. Name the encoder that made the vectors."
        )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m distill.embed", description="Take vectors you already have into a store."
    )
    parser.add_argument("path", type=Path, help="folder of the store; made if it is not there")
    parser.add_argument(
        "--teacher", required=True, help="the model that made the vectors: folder, Hub name or installed package"
    )
    parser.add_argument("--texts", required=True, help="the texts, row by row (JSONL, CSV, TXT, Parquet; .gz)")
    parser.add_argument("--vectors", type=Path, required=True, help=".npy of shape (texts, width)")
    parser.add_argument("--column", default=None, help="column of the texts")
    parser.add_argument(
        "--max-length", type=int, default=None, help="tokens the vectors were made with, if not the model's own"
    )
    parser.add_argument(
        "--role",
        choices=("query", "document"),
        default=None,
        help="whose prompt of the model the vectors were made with",
    )
    parser.add_argument(
        "--checked", type=int, default=32, help="texts that the model embeds, to compare with their vectors (32)"
    )
    return reported(partial(_take, parser.parse_args(arguments)))


def _take(options: argparse.Namespace) -> int:
    teacher = Encoder.from_pretrained(options.teacher, max_length=options.max_length)
    texts = load_texts(options.texts, column=options.column, unique=False).texts
    vectors = read_array(options.vectors)
    store = import_vectors(texts, vectors, teacher, options.path, role=options.role, checked=options.checked)
    print(f"{options.path}: {len(store):,} vectors of width {store.width}{_set_aside(store)}")
    return 0


def _set_aside(store: Store) -> str:
    """How many rows no student is trained on, by reason."""
    counts = {name: int((store.flags == flag).sum()) for flag, name in FLAG_NAMES.items()}
    found = ", ".join(f"{count:,} {name}" for name, count in counts.items() if count)
    return f"; set aside: {found}" if found else ""


def read_array(path: Path) -> np.ndarray:
    """The floating point numbers of a .npy file, mapped, not read. DataError for any other file."""
    try:
        with path.open("rb") as file:
            whole = file.read(len(MAGIC)) == MAGIC
        array = np.load(path, mmap_mode="r", allow_pickle=False) if whole else None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not an array that can be read: {error}") from error
    if array is None:
        raise DataError(f"{path} is no .npy file, which is expected: numpy.save(path, vectors) writes one.")
    if array.dtype.kind != "f":
        raise DataError(f"{path} holds no floating point array; save it with numpy.save(path, vectors).")
    return array
