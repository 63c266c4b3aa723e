"""Sentence pairs and how alike people found them, as in STS."""

import math
from dataclasses import dataclass
from typing import Any

from distill.errors import DataError
from distill.tables.sources import Source, read_table
from distill.tables.table import Table, find_column, shown, with_left_out


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Two sentences and how alike people found them, row by row. `empty` rows were left out.

    `source` is where they come from, a Hub data set with its commit; it names the count of empty rows, too.
    """

    sentence1: list[str]
    sentence2: list[str]
    score: list[float]
    empty: int = 0
    source: str = ""

    def __len__(self) -> int:
        return len(self.score)


def load_pairs(
    source: Source,
    *,
    columns: tuple[str, str, str] | None = None,
    limit: int | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> Pairs:
    """Sentence pairs with scores, as in STS: columns sentence1, sentence2, score, or the first three of a bare CSV.

    Where there is no column of the score's name, it is similarity_score or label.
    """
    first, second, score = columns or ("sentence1", "sentence2", "score")
    others = ("similarity_score", "label")
    table = read_table(source, revision=revision, token=token, wanted=(first, second, score, *others))
    if columns is None and table.columns[:3] == ["0", "1", "2"]:
        first, second, score = "0", "1", "2"
    first, second = find_column(table, first), find_column(table, second)
    score = find_column(table, score, *others)
    pairs = Pairs(sentence1=[], sentence2=[], score=[])
    empty = 0
    for number, row in table.rows:
        one, two = table.text(number, row, first), table.text(number, row, second)
        if not one.strip() or not two.strip():
            empty += 1
            continue
        value = _number(table, number, row, score)
        pairs.sentence1.append(one)
        pairs.sentence2.append(two)
        pairs.score.append(value)
        if limit is not None and len(pairs) >= limit:
            break
    if not len(pairs):
        raise DataError(f"{table.name} holds no pair of sentences ({empty} rows are empty).")
    named = with_left_out(table.name, {"empty": empty})
    return Pairs(sentence1=pairs.sentence1, sentence2=pairs.sentence2, score=pairs.score, empty=empty, source=named)


def _number(table: Table, number: int, row: dict[str, Any], column: str) -> float:
    value = table.cell(number, row, column)
    try:
        # float() reads "1_000" and True, and neither is meant as a score.
        result = math.nan if isinstance(value, bool) or "_" in str(value) else float(value)
    except (TypeError, ValueError, OverflowError):
        result = math.nan
    if not math.isfinite(result):
        raise DataError(f"{table.at(number, column)}: a finite number is expected, got {shown(value)}.")
    return result
