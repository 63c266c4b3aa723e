"""Texts x teacher -> store: over all processes, resumable, each text once.

python -m distill.embed PATH --teacher NAME --texts FILE --vectors FILE.npy     # take over vectors you already have
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import Float
from torch import Tensor

from distill import distributed, similarity
from distill.embed.job import Job, tidy
from distill.embed.places import default_store, lacks_codec, make_compressed, place, prepare
from distill.embed.taking import import_vectors
from distill.encoder import Encoder, Tokenized, require_encoder
from distill.errors import NumericsError
from distill.identity import computing, computing_tokens
from distill.metrics import effective_rank
from distill.store import GOOD, Store, text_keys
from distill.texts import distinct, refuse_one_text, refuse_what_is_no_text

__all__ = ["default_store", "embed", "embed_vocabulary", "import_vectors"]

DIRECTIONS = 256  # texts whose vectors are to fill more than one direction


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
    `path=None` is `default_store(teacher)`. NumericsError if the teacher gives (nearly) the same vector for all texts, or
    vectors on one line, which is looked at on the first 1,000.
    """
    require_encoder(teacher, "embed")
    refuse_one_text(texts)
    texts = texts if isinstance(texts, Sequence) else list(texts)
    refuse_what_is_no_text(texts)
    texts, prompt = distinct(texts), teacher.prompt(role)
    keys, compute = text_keys(texts, prompt=prompt), computing(teacher, texts, role)
    path = place(path, teacher, keys, compute, store_as)
    if store_as and distributed.main_first(partial(lacks_codec, path, store_as, teacher.width)):
        like_these = partial(embed, teacher=teacher, role=role, flush_seconds=flush_seconds)
        make_compressed(path, store_as, texts, prompt, like_these)
    store = prepare(path, teacher, keys, compute)
    if (store.find(keys) < 0).any():
        job = Job(teacher, texts, keys, partial(teacher.tokenize, prompt=prompt), "teacher vectors", flush_seconds)
        store = job.run(path)
    else:
        distributed.main_first(partial(tidy, store))
    _refuse_collapsed(store, store.find(keys[:1000]), teacher.name)
    return store


def embed_vocabulary(
    teacher: Encoder, path: str | Path | None = None, *, flush_seconds: float = 30.0
) -> Float[Tensor, "v e"]:
    """The teacher's vector of each token of its vocabulary, alone between the special tokens; stored like texts, by id."""
    require_encoder(teacher, "embed_vocabulary")
    teacher.require_transformer()
    names = [str(token) for token in range(len(teacher.tokenizer))]
    keys, compute = text_keys(names, kind="token"), computing_tokens(teacher)
    path = place(path, teacher, keys, compute)
    store = prepare(path, teacher, keys, compute)
    if (store.find(keys) < 0).any():
        store = Job(teacher, names, keys, partial(_single_tokens, teacher), "token vectors", flush_seconds).run(path)
    else:
        distributed.main_first(partial(tidy, store))
    return store.take(store.find(keys))


def _single_tokens(teacher: Encoder, names: Sequence[str]) -> Tokenized:
    tokens = teacher.single_tokens([int(name) for name in names])
    return Tokenized(tokens, [False] * len(names), [False] * len(names))


def _refuse_collapsed(store: Store, rows: np.ndarray, name: str) -> None:
    if len(rows) < 8:
        return
    good = rows[store.flags[rows] == GOOD]
    if len(good) < 2:
        raise NumericsError(
            f"{name} gives no vector that is finite and not 0 for {len(rows) - len(good)} of {len(rows)} texts."
        )
    unit = similarity.normalize(store.take(good))
    spread, centred = unit.std(dim=0).max(), unit - unit.mean(dim=0)
    if not spread > 1e-6 or effective_rank(centred[:DIRECTIONS]) < 1.1:
        raise NumericsError(
            f"{name} gives the same vector for all of {len(good)} texts, or vectors on one line (largest deviation of a coordinate {float(spread):.1e}). "
            "There is nothing to learn from it: check its weights, pooling and prompt."
        )
