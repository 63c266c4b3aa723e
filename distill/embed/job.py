"""A job of embedding: its batches, planned once; their rows, computed by all processes; shards, written behind."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from filelock import BaseFileLock, FileLock, Timeout
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from tqdm.auto import tqdm

from distill import distributed, files
from distill.ahead import ahead
from distill.encoder import Encoder, Tokenized
from distill.errors import ResourceError
from distill.modules import Reading, Tokens, TransformerBackbone, eval_mode
from distill.store import Rows, Store, packed
from distill.store.rows import flags_of
from distill.store.shards import JOB, Shard

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


@dataclass
class Job:
    """Texts to embed into a store, by all processes together."""

    teacher: Encoder
    texts: list[str]
    keys: np.ndarray
    tokenize: Callable[[Sequence[str]], Tokenized]
    name: str
    flush_seconds: float

    def run(self, path: Path) -> Store:
        lock = FileLock(path / ".lock")
        try:
            _begin(path, lock)
            store = Store.open(path)
            wanted = distributed.main_first(partial(self._wanted, store))
            if len(wanted):
                with eval_mode(self.teacher):
                    self._rounds(store, wanted)
                distributed.main_first(partial((path / JOB).unlink, missing_ok=True))
        finally:
            lock.release()
        return Store.open(path)

    def _wanted(self, store: Store) -> np.ndarray:
        """Numbers of the texts this job is about: an unfinished job's own list, if that still covers all that is missing."""
        missing = np.flatnonzero(store.find(self.keys) < 0)
        if not len(missing):
            return missing
        path, mine, earlier = store.path / JOB, packed(self.keys), packed(_earlier(store.path / JOB))
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
        bar = tqdm(total=int(missing.sum()), desc=self.name, unit="text", delay=2, disable=distributed.hides_bars())
        with ThreadPoolExecutor(1) as writer:
            while True:
                began = time.monotonic()
                writing = writer.submit(_written, store, computed)
                computed = []
                found = distributed.everywhere(partial(self._round, batches, each, bar, computed, writing))
                records = [record for written, _ in found for record in written]
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
        return Rows(rows, self.keys[batch.numbers[new]], lengths, flags_of(rows, batch.empty[new]))


def _written(store: Store, rows: list[Rows]) -> list[Shard]:
    return store.append(_joined(rows)) if rows else []


def _earlier(path: Path) -> np.ndarray:
    """Keys of an unfinished job; none if there is none, or if it cannot be read."""
    try:
        return load_file(path)["keys"]
    except (OSError, KeyError, ValueError, SafetensorError):
        return np.zeros((0, 2), np.uint64)


def tidy(store: Store) -> None:
    """Clear what a killed writer left in a store, if nobody is writing there; what may not be written to stays as it is."""
    if not (store.path / JOB).exists() and not store.unfinished():
        return
    with suppress(OSError), store.lock(timeout_seconds=0.0):  # a lock that is taken is one, too
        now = Store.open(store.path)
        now.remove_orphans()
        if (now.find(_earlier(now.path / JOB)) >= 0).all():  # all of the list is done
            (now.path / JOB).unlink(missing_ok=True)


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
        raise not_writable(path, error) from error
    return True


def _clear(path: Path) -> None:
    for name in Store.open(path).remove_orphans():
        print(f"{path}: deleted {name}, which the manifest does not name", file=sys.stderr)


def not_writable(path: Path, error: OSError) -> ResourceError:
    return ResourceError(f"{path} cannot be written: {error.strerror}. Name another folder with --store.")


def _joined(rows: list[Rows]) -> Rows:
    return Rows(*(np.concatenate(column) for column in zip(*(vars(row).values() for row in rows), strict=True)))
