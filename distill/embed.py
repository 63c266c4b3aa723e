"""Texts x teacher -> store: over all processes, resumable, each text once.

python -m distill.embed PATH --teacher NAME --texts FILE --vectors FILE.npy     # take over vectors you already have
"""

import argparse
import hashlib
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from filelock import BaseFileLock, FileLock, Timeout
from jaxtyping import Float
from safetensors.numpy import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from distill import distributed, files, similarity
from distill.data import load_texts
from distill.encoder import Encoder, Tokenized
from distill.errors import DataError, DistillError, IntegrityError, NumericsError, ResourceError
from distill.hub import cache_home
from distill.modules import Tokens
from distill.store import GOOD, NO_TOKENS, NOT_FINITE, ZERO, Rows, Store, text_keys

WINDOW = 4096  # texts that are sorted by length together; batches are cut from it
BATCH_TOKENS = 8192
_UNFINISHED = "job.safetensors"


@dataclass(frozen=True, eq=False)
class _Batch:
    numbers: np.ndarray  # which of the job's texts
    tokens: Tokens
    empty: np.ndarray


def default_store(teacher: Encoder) -> Path:
    """Where a teacher's vectors lie when no folder is named: the cache, by teacher and fingerprint."""
    fingerprint = sorted(teacher.fingerprint().items())
    return (
        cache_home()
        / "stores"
        / f"{Path(teacher.name).name}-{hashlib.sha256(repr(fingerprint).encode()).hexdigest()[:12]}"
    )


def embed(
    texts: Sequence[str],
    teacher: Encoder,
    path: str | Path | None = None,
    *,
    role: str | None = None,
    flush_seconds: float = 30.0,
) -> Store:
    """The store at `path`, with a vector for each of `texts`; what is stored already is not computed again.

    Every process calls it with the same texts; batches are dealt out, each process writes its own shards, and the main
    process names them in the manifest every `flush_seconds`: a kill loses no more than that. Batches are planned from
    the list of texts that were missing when the job began, which lies in the store until the job is done, so that a
    resumed job runs the same batches and writes the same bits, on any number of processes.
    `path=None` is `default_store(teacher)`. NumericsError if the teacher gives (nearly) the same vector for all texts.
    """
    path = Path(path) if path is not None else distributed.main_first(partial(default_store, teacher))
    texts = list(dict.fromkeys(texts))
    store = distributed.main_first(partial(_prepare, path, teacher))
    prompt = teacher.prompt(role)
    keys = text_keys(texts, prompt=prompt)
    if (store.find(keys) < 0).any():
        job = _Job(teacher, texts, keys, partial(teacher.tokenize, prompt=prompt), "teacher vectors", flush_seconds)
        store = job.run(path)
    _refuse_collapsed(store.take(store.find(keys[:1000])), teacher.name)
    return store


def embed_vocabulary(
    teacher: Encoder, path: str | Path | None = None, *, flush_seconds: float = 30.0
) -> Float[Tensor, "v e"]:
    """The teacher's vector of each token of its vocabulary, alone between the special tokens; stored like texts, by id."""
    path = Path(path) if path is not None else distributed.main_first(partial(default_store, teacher))
    store = distributed.main_first(partial(_prepare, path, teacher))
    names = [str(token) for token in range(len(teacher.tokenizer))]
    keys = text_keys(names, kind="token")
    if (store.find(keys) < 0).any():
        store = _Job(teacher, names, keys, partial(_single_tokens, teacher), "token vectors", flush_seconds).run(path)
    return store.take(store.find(keys))


def import_vectors(
    texts: Sequence[str],
    vectors: np.ndarray,
    teacher: Encoder,
    path: str | Path,
    *,
    role: str | None = None,
    checked: int = 16,
    least_cosine: float = 0.999,
) -> Store:
    """Take vectors (n, e) that you already have, of an index say, into a store.

    `checked` texts are embedded by the teacher and compared: IntegrityError names the first whose cosine is below
    `least_cosine`, since vectors of another model, prompt or max_length would teach the wrong space.
    """
    if vectors.shape != (len(texts), teacher.width):
        raise DataError(
            f"{len(texts):,} texts and vectors of shape {vectors.shape}; expected ({len(texts)}, {teacher.width})."
        )
    sample = np.linspace(0, len(texts) - 1, min(checked, len(texts))).astype(int)
    own = teacher.encode([texts[i] for i in sample], role=role)
    agreement = similarity.pairwise_cosine(own, torch.from_numpy(vectors[sample].astype(np.float32)))
    if (agreement < least_cosine).any():
        worst = int(agreement.argmin())
        raise IntegrityError(
            f"row {sample[worst]} ({texts[sample[worst]][:60]!r}) has cosine {agreement[worst]:.4f} to what {teacher.name} gives for it "
            f"(max_length {teacher.max_length}, prompt {teacher.prompt(role)!r}); at least {least_cosine} is asked. Name the encoder that made the vectors."
        )
    store = _prepare(Path(path), teacher)
    keys = text_keys(texts, prompt=teacher.prompt(role))
    _, first = np.unique(keys, axis=0, return_index=True)
    new = np.sort(first[store.find(keys[first]) < 0])
    tokenized = teacher.tokenize([texts[i] for i in new], prompt=teacher.prompt(role))
    flags = _flags(vectors[new], np.array(tokenized.empty))
    with store.lock():
        store.publish(store.append(Rows(vectors[new], keys[new], tokenized.tokens.lengths.numpy(), flags)))
    return store


def _prepare(path: Path, teacher: Encoder) -> Store:
    try:
        return Store.open_or_create(path, teacher.fingerprint(), teacher.width)
    except PermissionError as error:
        raise _not_writable(path, error) from error


@dataclass
class _Job:
    """Texts to embed into a store, by all processes together."""

    teacher: Encoder
    texts: list[str]
    keys: np.ndarray
    tokenize: Callable[[Sequence[str]], Tokenized]
    name: str
    flush_seconds: float

    def run(self, path: Path) -> Store:
        lock = FileLock(path / ".lock")
        distributed.main_first(partial(_begin, path, lock))
        try:
            store = Store.open(path)
            wanted = distributed.main_first(partial(self._wanted, store))
            self._rounds(store, self._plan(store, wanted))
            distributed.main_first(partial((path / _UNFINISHED).unlink, missing_ok=True))
        finally:
            lock.release()
        return Store.open(path)

    def _wanted(self, store: Store) -> list[int]:
        """Numbers of the texts this job is about: an unfinished job's own list, if that still covers all that is missing."""
        numbers = {bytes(key): number for number, key in enumerate(self.keys)}
        missing = np.flatnonzero(store.find(self.keys) < 0)
        path = store.path / _UNFINISHED
        if path.exists():
            earlier = [bytes(key) for key in load_file(path)["keys"]]
            if {bytes(self.keys[number]) for number in missing} <= set(earlier) <= set(numbers):
                return [numbers[key] for key in earlier]
        store.require_space(len(missing))
        with files.published_file(path) as temporary:
            save_file({"keys": self.keys[missing]}, temporary)
        return missing.tolist()

    def _plan(self, store: Store, wanted: list[int]) -> list[_Batch]:
        """Batches of texts of similar length; those whose texts are all stored by now are left out, none is cut differently."""
        batches = []
        for start in tqdm(range(0, len(wanted), WINDOW), desc="tokens", unit="window", delay=2, disable=_quiet()):
            window = np.array(wanted[start : start + WINDOW])
            tokenized = self.tokenize([self.texts[number] for number in window])
            empty = np.array(tokenized.empty)
            for index, tokens in tokenized.tokens.grouped(BATCH_TOKENS):
                batches.append(_Batch(window[index.numpy()], tokens, empty[index.numpy()]))
        return [batch for batch in batches if (store.find(self.keys[batch.numbers]) < 0).any()]

    def _rounds(self, store: Store, batches: list[_Batch]) -> None:
        """Each round every process computes and writes its batches, then the main process names the shards."""
        total = sum(len(batch.numbers) for batch in batches)
        bar = tqdm(total=total, desc=self.name, unit="text", delay=2, disable=_quiet())
        each, world = 1, distributed.world_size()
        while batches:
            began = time.monotonic()
            now, batches = batches[: each * world], batches[each * world :]
            rows = [self._compute(store, batch, bar) for batch in now[distributed.rank() :: world]]
            shards = store.append(_joined(rows)) if rows else []
            records = distributed.concatenate(distributed.gather_objects(shards))
            distributed.main_first(partial(store.publish, records))
            bar.n = total - sum(len(batch.numbers) for batch in batches)
            bar.refresh()
            seconds = distributed.agree(max(time.monotonic() - began, 1e-3))
            each = max(1, min(4 * each, int(each * self.flush_seconds / seconds)))
        bar.close()

    @torch.inference_mode()
    def _compute(self, store: Store, batch: _Batch, bar: tqdm) -> Rows:
        vectors = self.teacher.compute(batch.tokens).cpu()
        if not torch.isfinite(vectors).all() and self.teacher.compute_dtype != "float32":
            with torch.autocast(self.teacher.device.type, enabled=False):  # once more, in full precision
                vectors = self.teacher(batch.tokens).float().cpu()
        bar.update(len(batch.numbers))
        new = store.find(self.keys[batch.numbers]) < 0
        rows = vectors.numpy()
        lengths = batch.tokens.lengths.numpy()
        return Rows(rows[new], self.keys[batch.numbers[new]], lengths[new], _flags(rows[new], batch.empty[new]))


def _begin(path: Path, lock: BaseFileLock) -> None:
    """Take the writers' lock, say so if that means waiting, and clear what a killed writer left."""
    try:
        lock.acquire(timeout=1)
    except Timeout:
        print(f"waiting for another process that writes {path} ...", file=sys.stderr)
        lock.acquire(timeout=-1)
    except PermissionError as error:
        raise _not_writable(path, error) from error
    Store.open(path).remove_orphans()


def _not_writable(path: Path, error: OSError) -> ResourceError:
    return ResourceError(f"{path} cannot be written: {error.strerror}. Name another folder with --store.")


def _single_tokens(teacher: Encoder, names: Sequence[str]) -> Tokenized:
    tokens = teacher.single_tokens([int(name) for name in names])
    return Tokenized(tokens, [False] * len(names), [False] * len(names))


def _flags(vectors: np.ndarray, empty: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", over="ignore"):
        stored = vectors.astype(np.float16)
    flags = np.where(empty, NO_TOKENS, GOOD).astype(np.uint8)
    flags[~stored.any(axis=1)] = ZERO
    flags[~np.isfinite(stored).all(axis=1)] = NOT_FINITE
    return flags


def _joined(rows: list[Rows]) -> Rows:
    return Rows(*(np.concatenate(column) for column in zip(*(vars(row).values() for row in rows), strict=True)))


def _refuse_collapsed(vectors: Float[Tensor, "n e"], name: str) -> None:
    if len(vectors) < 8:
        return
    spread = similarity.normalize(vectors[torch.isfinite(vectors).all(dim=1)]).std(dim=0).max()
    if not spread > 1e-6:
        raise NumericsError(
            f"{name} gives the same vector for all of {len(vectors)} texts (largest deviation of a coordinate {float(spread):.1e}). "
            "There is nothing to learn from it: check its weights, pooling and prompt."
        )


def _quiet() -> bool | None:
    """tqdm's disable: None shows a bar on a terminal only."""
    return None if distributed.is_main() else True


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
    options = parser.parse_args(arguments)
    try:
        teacher = Encoder.from_pretrained(options.teacher, max_length=options.max_length)
        texts = load_texts(options.texts, column=options.column, unique=False).texts
        store = import_vectors(
            texts, np.load(options.vectors, mmap_mode="r", allow_pickle=False), teacher, options.path
        )
    except DistillError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{options.path}: {len(store):,} vectors of width {store.width}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
