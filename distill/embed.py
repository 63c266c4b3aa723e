"""Texts x teacher -> store: over all processes, resumable, each text once.

python -m distill.embed PATH --teacher NAME --texts FILE --vectors FILE.npy     # take over vectors you already have
"""

import argparse
import hashlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import BaseFileLock, FileLock, Timeout
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from distill import distributed, files, similarity
from distill.ahead import ahead
from distill.data import load_texts
from distill.encoder import Encoder, Tokenized
from distill.errors import DataError, DistillError, IntegrityError, NumericsError, RecipeError, ResourceError
from distill.hub import cache_home
from distill.identity import Compute, computing, computing_tokens, recognize
from distill.modules import Reading, Tokens, TransformerBackbone
from distill.store import GOOD, NO_TOKENS, NOT_FINITE, ZERO, Format, Rows, Store, compression, packed, text_keys
from distill.store.shards import JOB, MANIFEST, SAMPLE, SHARD_ROWS, Shard, read_manifest
from distill.store.vectors import refuse_other_fingerprint

# Texts that are sorted by length together; batches are cut from it. 34,748 texts of 14 tokens have 13.3 % padding in batches
# of 8,192 tokens from windows of 4,096 texts, 4.8 % from 16,384, 2.3 % from 65,536; cut again to 1,024, as on a CPU, 2.1, .7, .3 %.
WINDOW = 16_384
BATCH_TOKENS = 8192


@dataclass(frozen=True, eq=False)
class _Batch:
    """Texts that run together: their numbers in the job, whether they have a token of their own, which are not stored yet."""

    numbers: np.ndarray
    tokens: Tokens
    empty: np.ndarray
    new: np.ndarray


def default_store(teacher: Encoder, store_as: str | None = None) -> Path:
    """Where a teacher's vectors lie when no folder is named: the cache, by teacher, fingerprint and format."""
    return _place_of(teacher, teacher.fingerprint(), store_as)


def _place_of(teacher: Encoder, fingerprint: dict[str, Any], store_as: str | None) -> Path:
    name = f"{Path(teacher.name).name}-{hashlib.sha256(repr(sorted(fingerprint.items())).encode()).hexdigest()[:12]}"
    form = Format.parse(store_as or "float16")
    return cache_home() / "stores" / (f"{name}-{form}" if form.compressed else name)


def embed(
    texts: Sequence[str],
    teacher: Encoder,
    path: str | Path | None = None,
    *,
    role: str | None = None,
    flush_seconds: float = 30.0,
    store_as: str | None = None,
) -> Store:
    """The store at `path`, with a vector for each of `texts`; what is stored already is not computed again.

    Every process calls it with the same texts; batches are dealt out, each process writes its own shards, and the main
    process names them in the manifest, so often that a kill loses no more than `flush_seconds`. Texts are tokenized and shards
    are written in threads, while the teacher computes. Batches are planned from
    the list of texts that were missing when the job began, which lies in the store until the job is done, so that a
    resumed job runs the same batches and writes the same bits, on any number of processes.

    `store_as` is the format of a store that is made now: float16, int8, pca-K or pca-K-int8 (`store.compression`); None: float16.
    To fit it, 16,384 of the texts are embedded before the others, once. RecipeError if the store that stands has another.
    `path=None` is `default_store(teacher)`. NumericsError if the teacher gives (nearly) the same vector for all texts.
    """
    texts, prompt = list(dict.fromkeys(texts)), teacher.prompt(role)
    keys, compute = text_keys(texts, prompt=prompt), computing(teacher, texts, role)
    path = _place(path, teacher, keys, compute, store_as)
    if store_as and distributed.main_first(partial(_lacks_codec, path, store_as, teacher.width)):
        _make_compressed(path, store_as, texts, teacher, role, flush_seconds)
    store = _prepare(path, teacher, keys, compute)
    if (store.find(keys) < 0).any():
        job = _Job(teacher, texts, keys, partial(teacher.tokenize, prompt=prompt), "teacher vectors", flush_seconds)
        store = job.run(path)
    _refuse_collapsed(store.take(store.find(keys[:1000])), teacher.name)
    return store


def embed_vocabulary(
    teacher: Encoder, path: str | Path | None = None, *, flush_seconds: float = 30.0
) -> Float[Tensor, "v e"]:
    """The teacher's vector of each token of its vocabulary, alone between the special tokens; stored like texts, by id."""
    teacher.require_transformer()
    names = [str(token) for token in range(len(teacher.tokenizer))]
    keys, compute = text_keys(names, kind="token"), computing_tokens(teacher)
    path = _place(path, teacher, keys, compute)
    store = _prepare(path, teacher, keys, compute)
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
    if not texts or vectors.shape != (len(texts), teacher.width):
        raise DataError(
            f"{len(texts):,} texts and vectors of shape {vectors.shape}; expected ({max(len(texts), 1)}, {teacher.width})."
        )
    prompt = teacher.prompt(role)
    _refuse_foreign(texts, vectors, teacher, role, checked, least_cosine)
    keys = text_keys(texts, prompt=prompt)
    _, first = np.unique(keys, axis=0, return_index=True)
    with _prepare(Path(path), teacher, keys, computing(teacher, texts, role)).lock():
        store = Store.open(path)  # as it is now: another process may have written while this one waited
        new = np.sort(first[store.find(keys[first]) < 0])
        store.require_space(len(new))
        written: list[Shard] = []
        for start in range(0, len(new), SHARD_ROWS):
            part = new[start : start + SHARD_ROWS]
            tokenized = teacher.tokenize([texts[i] for i in part], prompt=prompt)
            flags = _flags(vectors[part], np.array(tokenized.empty))
            written += store.append(Rows(vectors[part], keys[part], tokenized.tokens.lengths.numpy(), flags))
        store.publish(written)
    return store


def _refuse_foreign(
    texts: Sequence[str], vectors: np.ndarray, teacher: Encoder, role: str | None, checked: int, least_cosine: float
) -> None:
    """Compare some of the vectors with what the teacher gives; rows that will be set aside anyway say nothing."""
    sample = np.linspace(0, len(texts) - 1, min(checked, len(texts))).astype(int)
    theirs = torch.from_numpy(vectors[sample].astype(np.float32))
    usable = theirs.isfinite().all(dim=1) & theirs.any(dim=1)
    if not usable.any():
        raise DataError(f"none of {len(sample)} vectors that were looked at is finite and not zero.")
    sample, theirs = sample[usable.numpy()], theirs[usable]
    own = teacher.encode([texts[i] for i in sample], role=role)
    agreement = similarity.pairwise_cosine(own, theirs)
    if not (agreement >= least_cosine).all():
        worst = int(agreement.nan_to_num(-2).argmin())
        raise IntegrityError(
            f"row {sample[worst]} ({texts[sample[worst]][:60]!r}) has cosine {agreement[worst]:.4f} to what {teacher.name} gives for it "
            f"(max_length {teacher.max_length}, prompt {teacher.prompt(role)!r}); at least {least_cosine} is asked. Name the encoder that made the vectors."
        )


def _place(
    path: str | Path | None, teacher: Encoder, keys: np.ndarray, compute: Compute, store_as: str | None = None
) -> Path:
    """The folder that was named, or the teacher's own in the cache."""
    return Path(path) if path is not None else distributed.main_first(partial(_own, teacher, keys, compute, store_as))


def _own(teacher: Encoder, keys: np.ndarray, compute: Compute, store_as: str | None) -> Path:
    """`default_store`; if there is none yet, one that another release's description of the teacher named."""
    fingerprint = teacher.fingerprint()
    own = _place_of(teacher, fingerprint, store_as)
    if (own / MANIFEST).exists():
        return own
    form = Format.parse(store_as or "float16")
    for manifest in sorted(own.parent.glob(f"{Path(teacher.name).name}-*/{MANIFEST}")):
        with suppress(IntegrityError, ResourceError):
            same_format = read_manifest(manifest.parent).format == form
            if same_format and recognize(manifest.parent, teacher, fingerprint, keys, compute):
                return manifest.parent
    return own


def _prepare(path: Path, teacher: Encoder, keys: np.ndarray, compute: Compute) -> Store:
    """The store at `path`, made if it is not there by the main process; every process opens it by itself."""
    distributed.main_first(partial(_create, path, teacher, keys, compute))
    return Store.open(path)


def _create(path: Path, teacher: Encoder, keys: np.ndarray, compute: Compute) -> None:
    fingerprint = teacher.fingerprint()
    try:
        recognize(path, teacher, fingerprint, keys, compute)
        Store.open_or_create(path, fingerprint, teacher.width)
        if (path / SAMPLE / MANIFEST).exists():
            _take_in_sample(path)
    except PermissionError as error:
        raise _not_writable(path, error) from error


def _lacks_codec(path: Path, store_as: str, width: int) -> bool:
    """Whether there is no store yet and one with a codec is wanted. RecipeError if there is one of another format."""
    wanted = Format.parse(store_as)
    wanted.columns(width)
    if not (path / MANIFEST).exists():
        return wanted.compressed
    found = read_manifest(path).format
    if found != wanted:
        way = f"python -m distill.store compress {path} NEW --as {wanted}" if not found.compressed else "embed anew"
        raise RecipeError(
            f"{path} holds its vectors as {found}, and {wanted} was asked for. Leave that out, or make another store of it: {way}."
        )
    return False


def _make_compressed(
    path: Path, store_as: str, texts: Sequence[str], teacher: Encoder, role: str | None, flush_seconds: float
) -> None:
    """Make an empty store whose codec is fitted to some of the texts, evenly spaced.

    These are embedded first, into a float16 store inside it, which `_create` takes in and deletes: no text is computed
    twice. Killed at any point, the next call goes on from there to the same bits.
    """
    chosen = [texts[number] for number in compression.spread(len(texts), compression.FIT_ROWS)]
    sample = embed(chosen, teacher, path / SAMPLE, role=role, flush_seconds=flush_seconds)
    rows = sample.find(text_keys(chosen, prompt=teacher.prompt(role)))
    distributed.main_first(partial(_create_fitted, path, Format.parse(store_as), sample, rows))


def _create_fitted(path: Path, form: Format, sample: Store, rows: np.ndarray) -> None:
    Store.open_or_create(path, sample.fingerprint, sample.width, codec=sample.fit(form, rows))


def _take_in_sample(path: Path) -> None:
    """Write the rows of the sample into the store around it, and delete the sample."""
    with Store.open(path).lock():
        if not (path / SAMPLE / MANIFEST).exists():
            return
        store, sample = Store.open(path), Store.open(path / SAMPLE)
        refuse_other_fingerprint(path / SAMPLE, sample.fingerprint, store.fingerprint)
        store.remove_orphans()
        store.require_space(len(sample))
        written: list[Shard] = []
        for rows in sample.blocks():
            new = store.find(rows.keys) < 0
            written += store.append(Rows(*(column[new] for column in vars(rows).values())))
        store.publish(written)
        files.remove_folder(path / SAMPLE)


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
        lock, training = FileLock(path / ".lock"), self.teacher.training
        self.teacher.eval()
        try:
            _begin(path, lock)
            store = Store.open(path)
            wanted = distributed.main_first(partial(self._wanted, store))
            if len(wanted):
                self._rounds(store, wanted)
                distributed.main_first(partial((path / JOB).unlink, missing_ok=True))
        finally:
            self.teacher.train(training)
            lock.release()
        return Store.open(path)

    def _wanted(self, store: Store) -> np.ndarray:
        """Numbers of the texts this job is about: an unfinished job's own list, if that still covers all that is missing."""
        missing, path = np.flatnonzero(store.find(self.keys) < 0), store.path / JOB
        earlier_keys = _earlier(path)
        if (
            path.exists() and (store.find(earlier_keys) >= 0).all()
        ):  # it was done, and then killed or could not be deleted
            path.unlink()
        if not len(missing):
            return missing
        mine, earlier = packed(self.keys), packed(earlier_keys)
        if np.isin(mine[missing], earlier).all() and np.isin(earlier, mine).all():
            order = np.argsort(mine, kind="stable")
            return order[np.searchsorted(mine, earlier, sorter=order)]
        store.require_space(len(missing))
        with files.published_file(path) as temporary:
            save_file({"keys": self.keys[missing]}, temporary)
        return missing

    def _batches(self, wanted: np.ndarray, missing: np.ndarray) -> Iterator[_Batch]:
        """This process's batches of texts of similar length. Those without a missing text are left out, none is cut differently.

        Batches are dealt out one by one; whole windows where there are many, so that each is tokenized by one process.
        """
        rank, world, dealt = distributed.rank(), distributed.world_size(), 0
        by_window = len(wanted) >= 8 * world * WINDOW
        starts = range(0, len(wanted), WINDOW)[rank::world] if by_window else range(0, len(wanted), WINDOW)
        for window, new, tokenized in ahead(self._windows(wanted, missing, starts)):
            empty = np.array(tokenized.empty)
            for index in tokenized.tokens.groups(BATCH_TOKENS):
                chosen = index.numpy()
                if new[chosen].any():
                    if by_window or dealt % world == rank:
                        yield _Batch(window[chosen], tokenized.tokens.rows(index), empty[chosen], new[chosen])
                    dealt += 1

    def _windows(
        self, wanted: np.ndarray, missing: np.ndarray, starts: range
    ) -> Iterator[tuple[np.ndarray, np.ndarray, Tokenized]]:
        """Numbers of the texts of each window that has a missing one, which these are, and the tokens of all of them."""
        for start in starts:
            window, new = wanted[start : start + WINDOW], missing[start : start + WINDOW]
            if new.any():
                yield window, new, self.tokenize([self.texts[number] for number in window])

    def _rounds(self, store: Store, wanted: np.ndarray) -> None:
        """Each round every process computes some batches, while a thread writes those of the round before; then these are published.

        A round takes half of `flush_seconds`: what a kill loses is the one that is computed and the one that is written.
        """
        missing = (
            store.find(self.keys[wanted]) < 0
        )  # as the job begins: only the main process sees what is published later
        batches, each, done, start = self._batches(wanted, missing), 1, 0, time.monotonic()
        computed: list[Rows] = []
        self._reading()
        bar = tqdm(total=int(missing.sum()), desc=self.name, unit="text", delay=2, disable=_quiet())
        with ThreadPoolExecutor(1) as writer:
            while True:
                began = time.monotonic()
                writing = writer.submit(_written, store, computed)
                computed = []
                found = distributed.everywhere(partial(self._round, batches, each, bar, computed, writing))
                records = distributed.concatenate([written for written, _ in found])
                if records:
                    distributed.main_first(partial(store.publish, records))
                new = sum(count for _, count in found)
                if not new:
                    break
                done += new
                bar.n = done
                bar.refresh()
                seconds = distributed.agree(max(time.monotonic() - began, 1e-3))
                each = max(1, min(4 * each, int(each * self.flush_seconds / 2 / seconds)))
        bar.close()
        self._tell(done, time.monotonic() - start)

    def _round(
        self,
        batches: Iterator[_Batch],
        count: int,
        bar: tqdm,
        computed: list[Rows],
        writing: "Future[list[Shard]]",
    ) -> tuple[list[Shard], int]:
        """Compute some batches; then what was being written is, and the number of rows that are to be written next."""
        computed.extend(self._compute(batch, bar) for batch in islice(batches, count))
        return writing.result(), sum(len(rows.keys) for rows in computed)

    def _reading(self) -> Reading:
        backbone = self.teacher.backbone
        return backbone.take_reading() if isinstance(backbone, TransformerBackbone) else Reading()

    def _tell(self, count: int, seconds: float) -> None:
        if distributed.is_main():
            rate, padding = count / max(seconds, 1e-9), self._reading().padding
            print(
                f"{self.name}: {count:,} in {seconds:,.0f} s, {rate:,.0f} a second; {padding:.1%} padding",
                file=sys.stderr,
            )

    @torch.inference_mode()
    def _compute(self, batch: _Batch, bar: tqdm) -> Rows:
        vectors = self.teacher.compute(batch.tokens).cpu()
        if not torch.isfinite(vectors).all() and self.teacher.compute_dtype != "float32":
            with torch.autocast(self.teacher.device.type, enabled=False):  # once more, in full precision
                vectors = self.teacher(batch.tokens).float().cpu()
        new = batch.new
        bar.update(int(new.sum()))
        rows, lengths = vectors.numpy()[new], batch.tokens.lengths.numpy()[new]
        return Rows(rows, self.keys[batch.numbers[new]], lengths, _flags(rows, batch.empty[new]))


def _written(store: Store, rows: list[Rows]) -> list[Shard]:
    return store.append(_joined(rows)) if rows else []


def _earlier(path: Path) -> np.ndarray:
    """Keys of an unfinished job; none if there is none, or if it cannot be read."""
    try:
        return load_file(path)["keys"]
    except (OSError, KeyError, ValueError, SafetensorError):
        return np.zeros((0, 2), np.uint64)


def _begin(path: Path, lock: BaseFileLock) -> None:
    """Take the writers' lock, say so if that means waiting, and clear what a killed writer left."""
    seconds = 1.0
    while not distributed.main_first(partial(_locked, path, lock, seconds)):  # in steps: a collective has a time limit
        if distributed.is_main() and seconds == 1.0:
            print(f"waiting for another process that writes {path} ...", file=sys.stderr)
        seconds = 60.0
    distributed.main_first(partial(_clear, path))


def _locked(path: Path, lock: BaseFileLock, seconds: float) -> bool:
    try:
        lock.acquire(timeout=seconds)
    except Timeout:
        return False
    except PermissionError as error:
        raise _not_writable(path, error) from error
    return True


def _clear(path: Path) -> None:
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
    finite = vectors[torch.isfinite(vectors).all(dim=1)]
    if len(finite) < 2:
        raise NumericsError(f"{name} gives no finite vector for {len(vectors) - len(finite)} of {len(vectors)} texts.")
    spread = similarity.normalize(finite).std(dim=0).max()
    if not spread > 1e-6:
        raise NumericsError(
            f"{name} gives the same vector for all of {len(finite)} texts (largest deviation of a coordinate {float(spread):.1e}). "
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
    parser.add_argument(
        "--role",
        choices=("query", "document"),
        default=None,
        help="whose prompt of the model the vectors were made with",
    )
    options = parser.parse_args(arguments)
    try:
        teacher = Encoder.from_pretrained(options.teacher, max_length=options.max_length)
        texts = load_texts(options.texts, column=options.column, unique=False).texts
        store = import_vectors(texts, _read_array(options.vectors), teacher, options.path, role=options.role)
    except DistillError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{options.path}: {len(store):,} vectors of width {store.width}")
    return 0


def _read_array(path: Path) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not an array that can be read: {error}") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind != "f":
        raise DataError(f"{path} holds no floating point array; save it with numpy.save(path, vectors).")
    return array


if __name__ == "__main__":
    sys.exit(main())
