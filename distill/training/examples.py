"""What a student is trained on: texts as the student reads them, beside the stored vectors of the teacher."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distill.encoder import Encoder
from distill.errors import DataError
from distill.modules import Tokens
from distill.store import FLAG_NAMES, GOOD, Store, text_keys
from distill.texts import Texts, distinct, texts_by_role


@dataclass(frozen=True, eq=False)
class Examples:
    """What a student is trained on: its own tokens of each text, and the store's row of the teacher's vector of it."""

    texts: list[str]
    tokens: Tokens
    rows: np.ndarray
    keys: Tensor
    report: str = ""

    def __len__(self) -> int:
        return len(self.texts)


def match(texts: Texts, student: Encoder, teacher: Encoder, store: Store) -> Examples:
    """Match texts with their stored vectors. A mapping names the role of its texts, {"query": [...], "document": [...]}.

    Texts whose vector was set aside, or of which the student reads no token, are left out and counted in `report`;
    so is the share that each side cuts at its max_length. DataError if nothing is left.
    """
    by_role = texts_by_role(texts)
    if not by_role:
        raise DataError("no texts to train on: the mapping of roles is empty.")
    parts = [_part(distinct(some), role, student, teacher, store) for role, some in by_role]
    ids = torch.cat([part.tokens.ids for part in parts])
    lengths = torch.cat([part.tokens.lengths for part in parts])
    rows = np.concatenate([part.rows for part in parts])
    joined = Examples(
        [text for part in parts for text in part.texts],
        Tokens(ids, lengths),
        rows,
        torch.cat([part.keys for part in parts]),
    )
    report = "; ".join(part.report for part in parts)
    if store.distortion:
        report += f"; teacher vectors as {store.codec.format}: {store.distortion}"
    if not len(joined):
        raise DataError(f"no text is left to train on: {report}.")
    return Examples(joined.texts, joined.tokens, joined.rows, joined.keys, report)


def _part(texts: list[str], role: str | None, student: Encoder, teacher: Encoder, store: Store) -> Examples:
    keys = text_keys(texts, prompt=teacher.prompt(role))
    rows = store.find(keys)
    if (rows < 0).any():
        store.vectors(texts, prompt=teacher.prompt(role))  # raises, naming the first
    tokenized = student.tokenize(texts, prompt=student.prompt(role))
    flags = store.flags[rows]
    good = (flags == GOOD) & ~np.array(tokenized.empty, dtype=bool)
    notes = [f"{len(texts):,} texts" + (f" ({role})" if role else "")]
    notes += [
        f"{int((flags == flag).sum())} left out: teacher vector {name}, first of {texts[int((flags == flag).argmax())]!r:.60}"
        for flag, name in FLAG_NAMES.items()
        if (flags == flag).any()
    ]
    unread = int(((flags == GOOD) & ~good).sum())
    notes += [f"{unread} left out: the student reads no token"] if unread else []
    cut = np.array(tokenized.truncated)
    notes += [f"{cut.mean():.1%} cut by the student"] if cut.any() else []
    full = store.token_counts[rows] >= teacher.max_length  # a store does not keep whether there was more
    notes += [f"{full.mean():.1%} reach the teacher's limit"] if full.any() else []
    chosen = np.flatnonzero(good)
    short = torch.from_numpy(keys[chosen, 0].view(np.int64))
    return Examples(
        [texts[i] for i in chosen],
        tokenized.tokens.rows(torch.from_numpy(chosen)),
        rows[chosen],
        short,
        ", ".join(notes),
    )
