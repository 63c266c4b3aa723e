"""The columns of a student x teacher matrix: the teacher rows of everyone's batch, then the bank, tile by tile.

Column i is the twin of row i of the global batch. Keys (int64) name texts; columns without a key are other texts.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from distill.streaming.engine import Share, UnitRows


@dataclass(frozen=True)
class LeftOut:
    """What is no column of some rows: the twin, column `twin` of the first row, and columns of the row's key, if there are keys."""

    twin: int
    keys: Int[Tensor, " b"] | None = None
    column_keys: Int[Tensor, " n"] | None = None

    def fill_(self, matrix: Float[Tensor, "b n"]) -> None:
        """Put -inf there."""
        if self.keys is not None and self.column_keys is not None:
            same_text = rearrange(self.keys, "b -> b 1") == rearrange(self.column_keys, "n -> 1 n")
            matrix.masked_fill_(same_text, -torch.inf)
        if -len(matrix) < self.twin < matrix.shape[1]:
            matrix.diagonal(self.twin).fill_(-torch.inf)

    def mirrored(self) -> "LeftOut":
        """Of the transposed matrix."""
        return LeftOut(-self.twin, self.column_keys, self.keys)


@dataclass(frozen=True)
class Tile:
    """Some neighbouring columns."""

    start: int
    rows: Float[Tensor, "n d"]
    keys: Int[Tensor, " n"] | None

    @property
    def place(self) -> slice:
        """Where these columns stand among all."""
        return slice(self.start, self.start + len(self.rows))


class Columns:
    def __init__(
        self,
        share: Share,
        teacher: UnitRows,
        bank: Float[Tensor, "n d"] | None,
        keys: Int[Tensor, " b"] | None,
        bank_keys: Int[Tensor, " n"] | None,
    ) -> None:
        self.share, self.keys = share, keys
        self._pieces = [(0, share.everyones(teacher), None if keys is None else share.everyone(keys))]
        if bank is not None and len(bank):
            self._pieces.append((share.total, UnitRows(bank, teacher.dtype), bank_keys))
        self.count = share.total + (0 if bank is None else len(bank))

    def tiles(self, size: int | None = None) -> Iterator[Tile]:
        """All columns in order; a tile is of the batch or of the bank, never of both."""
        for first, rows, keys in self._pieces:
            for start, stop in rows.tiles(size):
                yield Tile(first + start, rows.tile(start, stop), None if keys is None else keys[start:stop])

    def left_out(self, rows: slice, tile: Tile) -> LeftOut:
        twin = self.share.start + rows.start - tile.start
        if self.keys is None or tile.keys is None:
            return LeftOut(twin)
        return LeftOut(twin, self.keys[rows], tile.keys)
