"""Rows of a store: what one holds, what its flag says, and the key it is found by."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from distill.errors import DataError
from distill.texts import refuse_one_text, refuse_what_is_no_text

GOOD, NOT_FINITE, ZERO, NO_TOKENS = 0, 1, 2, 3  # flags of a row; only GOOD rows are trained on
FLAG_NAMES = {NOT_FINITE: "not finite", ZERO: "zero vector", NO_TOKENS: "no tokens"}


@dataclass(frozen=True)
class Rows:
    """Rows to be written: vectors (n, e), keys (n, 2) uint64, token counts (n), flags (n)."""

    vectors: np.ndarray
    keys: np.ndarray
    token_counts: np.ndarray
    flags: np.ndarray


def flags_of(vectors: np.ndarray, empty: np.ndarray) -> np.ndarray:
    """Flags of rows as float16 keeps them; `empty` says which texts have no tokens."""
    with np.errstate(invalid="ignore", over="ignore"):
        stored = vectors.astype(np.float16)
    flags = np.where(empty, NO_TOKENS, GOOD).astype(np.uint8)
    flags[~stored.any(axis=1)] = ZERO
    flags[~np.isfinite(stored).all(axis=1)] = NOT_FINITE
    return flags


def text_keys(texts: Iterable[str], *, prompt: str = "", kind: str = "text") -> np.ndarray:
    """128-bit keys (n, 2) uint64 of (kind, prompt, exact text). The same text under two prompts has two keys.

    DataError for one text in place of a list of them, and for what is no text.
    """
    if isinstance(texts, str):
        refuse_one_text(texts)
    head = f"{kind}\0{len(prompt)}\0{prompt}\0".encode("utf-8", "surrogatepass")
    try:
        digests = [
            hashlib.blake2b(head + text.encode("utf-8", "surrogatepass"), digest_size=16).digest() for text in texts
        ]
    except AttributeError as error:
        if isinstance(texts, Sequence):
            refuse_what_is_no_text(texts)
        raise DataError(f"keys are of texts: {error}.") from error
    return np.frombuffer(b"".join(digests), dtype="<u8").reshape(-1, 2)


def packed(keys: np.ndarray) -> np.ndarray:
    """(n, 2) uint64 -> (n) byte strings of 16, which numpy sorts and compares whole."""
    return np.ascontiguousarray(keys).view("S16").reshape(-1)
