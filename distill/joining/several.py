"""Several teachers as one target: embedded, joined and trained on like one, and measured against on texts that come later.

target = several([one, other], texts, [None, None], method="procrustes", weights=(2.0, 1.0))
run = train(student, match(texts, student, one, target.joined.store), target.joined.store, loss, config, output=output)
vectors = target.encode(more_texts)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from distill import distributed
from distill.embed import embed
from distill.encoder import Encoder
from distill.joining.methods import Method, join_stores, keys_by_role
from distill.joining.stores import Joined, shares, side_by_side
from distill.similarity import normalize
from distill.store import Store, text_keys
from distill.texts import Texts, texts_by_role


@dataclass(frozen=True, eq=False)
class Several:
    """Several teachers as one: each with its store, and what they were joined into."""

    teachers: Sequence[Encoder]
    stores: Sequence[Path]
    """Of each teacher's own vectors, in their order."""
    method: Method
    weights: tuple[float, ...]
    """They add up to 1."""
    joined: Joined
    """The vectors to train on, under the first teacher's keys."""

    @property
    def keeps_index(self) -> bool:
        """Whether the joined vectors live in the first teacher's space, so that an index of its vectors stays."""
        return self.method == "procrustes"

    def encode(self, texts: Sequence[str], *, role: str | None = None) -> Float[Tensor, "n e"]:
        """Joined unit vectors of any texts. What a store lacks is embedded into it; zeros where a teacher has no good vector."""
        units = [self._unit(number, texts, role) for number in range(len(self.teachers))]
        good = torch.stack([rows.any(dim=1) for rows in units]).all(dim=0)
        return normalize(side_by_side(units, self.joined.matrix).masked_fill(~rearrange(good, "n -> n 1"), 0.0))

    def _unit(self, number: int, texts: Sequence[str], role: str | None) -> Float[Tensor, "n e"]:
        teacher, store = self.teachers[number], Store.open(self.stores[number])
        prompt = teacher.prompt(role)
        if (store.find(text_keys(texts, prompt=prompt)) < 0).any():
            store = embed(texts, teacher, store.path, role=role)
        vectors = store.vectors(texts, prompt=prompt)
        return normalize(torch.where(vectors.isfinite().all(dim=1, keepdim=True), vectors, 0.0))

    def as_json(self) -> dict[str, Any]:
        return {
            "teachers": [teacher.name for teacher in self.teachers],
            "method": self.method,
            "weights": list(self.weights),
            "width": self.joined.store.width,
            "cosine_error": self.joined.error,
        }

    def __str__(self) -> str:
        named = zip(self.teachers, self.weights, strict=True)
        return f"{self.method} of {', '.join(f'{teacher.name} ({weight:.3g})' for teacher, weight in named)}"


def several(
    teachers: Sequence[Encoder],
    texts: Texts,
    paths: Sequence[str | Path | None],
    *,
    method: Method = "procrustes",
    weights: Sequence[float] | None = None,
    width: int | None = None,
    store_as: str | None = None,
) -> Several:
    """Embed texts (by role, if they have roles) by each teacher into its own store, and join them beside the first one.

    What is stored already, and a joined store that stands, are read. Every process calls it. Cost: a pass of each teacher
    over what it has not embedded; over the stored vectors, one to find the matrix, one to write. A teacher's store that is
    made now is `store_as` (see `embed`), the joined one float16.
    """
    stores = []
    for teacher, path in zip(teachers, paths, strict=True):
        for role, some in texts_by_role(texts):
            store = embed(some, teacher, path, role=role, store_as=store_as)
        stores.append(Store.open(store.path))
    keys = [keys_by_role(texts, teacher) for teacher in teachers]
    write = partial(join_stores, stores, method, weights, width, keys)
    made: list[Joined] = []  # on the main process; the others then read what it wrote
    distributed.main_first(lambda: made.append(write()))
    joined = made[0] if made else write()
    own = [store.path for store in stores]
    return Several(tuple(teachers), own, method, tuple(shares(weights, len(stores))), joined)
