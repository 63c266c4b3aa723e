"""Named rows, the columns to take from them, and what is wrong with row 1,234."""

import difflib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import Any

from distill.errors import DataError

Row = tuple[int, dict[str, Any]]

SAMPLE_ROWS = 1000  # as many rows are looked at to tell text columns from number columns


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows with names, numbered as an editor numbers them; `sample` are the first ones, by which columns are chosen."""

    name: str
    unit: str  # what `number` counts: a line of a text file, a row of a table, an item of a list
    columns: list[str]
    rows: Iterator[Row]
    sample: list[Row] = field(default_factory=list)
    typed: bool = True  # False where every cell is a string, so that numbers have to be guessed
    unnamed: bool = False  # True where nothing has a name: lines of a file, items of a list
    first: str = ""  # the first row of a CSV without a known header, to show in messages
    commit: str | None = None  # of a Hub data set, where it is known; the name has it, too

    def at(self, number: int, column: str) -> str:
        return f"{self.name}, {self.unit} {number}, column {column!r}"

    def cell(self, number: int, row: dict[str, Any], column: str) -> Any:
        if column not in row:
            raise DataError(f"{self.name}, {self.unit} {number}: there is no {column!r}, only {listed(row)}.")
        return row[column]

    def text(self, number: int, row: dict[str, Any], column: str) -> str:
        """The cell, if it is a text that a tokenizer can take."""
        value = self.cell(number, row, column)
        if not isinstance(value, str):
            raise DataError(f"{self.at(number, column)}: a text is expected, got {shown(value)}.")
        if "\0" in value:
            raise DataError(
                f"{self.at(number, column)}: the text holds a NUL character at position {value.index(chr(0))}. No text has "
                "one: see what wrote it (a binary field, UTF-16), or take it out, text.replace(chr(0), '')."
            )
        if not value.isascii():
            try:
                value.encode("utf-8")
            except UnicodeEncodeError as error:
                raise DataError(
                    f"{self.at(number, column)}: half a surrogate pair ({value[error.start]!r}) at position {error.start}; "
                    "the text was cut in the middle of a character before it was written."
                ) from None
        return value


@dataclass(frozen=True)
class Place:
    """A cell, to be named in a message later."""

    table: Table
    number: int
    column: str

    def __str__(self) -> str:
        return self.table.at(self.number, self.column)


def with_left_out(source: str, counts: Mapping[str, int]) -> str:
    """A source's name with how many rows of which kind were left out of it, if any were."""
    some = [f"{count:,} {kind}" for kind, count in counts.items() if count]
    return f"{source} ({' and '.join(some)} left out)" if some else source


def sampled(table: Table) -> Table:
    """The table with its first rows looked at, by which columns are chosen."""
    sample = list(islice(table.rows, SAMPLE_ROWS))
    if not sample:
        raise DataError(f"{table.name} is empty: there is no row in it.")
    columns = table.columns or list(dict.fromkeys(key for _, row in sample for key in row))
    return replace(table, columns=columns, sample=sample, rows=chain(sample, table.rows))


# Columns


def column_names(column: str | None) -> tuple[str, ...]:
    """What may be a column's name in `column`: the whole, and its parts between commas."""
    return () if column is None else (column, *(part.strip() for part in column.split(",")))


def text_columns(table: Table, column: str | None) -> list[str]:
    """The columns to take texts from."""
    if table.unnamed:
        return ["text"]
    if column is not None:
        names = [column] if column in table.columns else [part.strip() for part in column.split(",")]
        chosen = [find_column(table, name) for name in names]
        for name in chosen:
            if not table.typed and not _holds_text(table, name):
                raise DataError(f"{table.name}: column {name!r} holds numbers, not texts.")
        return chosen
    for names in (["text"], ["sentence1", "sentence2"]):
        if len(found := with_names(table.columns, names)) == len(names):
            return found
    texts = [name for name in table.columns if _holds_text(table, name)]
    bare_pairs = not table.typed and table.columns == ["0", "1", "2"] and texts == ["0", "1"]
    if len(texts) == 1 or bare_pairs:
        return texts
    what = "several columns hold text" if texts else "no column holds text"
    which = "--column NAME, or by position, --column 0" if table.first else "--column NAME"
    raise DataError(f"{table.name}: {what}; {_known(table)}. Say which: {which} (column=... in Python).")


def _holds_text(table: Table, column: str) -> bool:
    values = [row[column] for _, row in table.sample if column in row]
    if table.typed:
        return any(isinstance(value, str) for value in values)
    return not all(_is_numeric(value) for value in values)


def _is_numeric(cell: str) -> bool:
    try:
        float(cell or "0")
    except ValueError:
        return False
    return True


def with_names(columns: Iterable[str], names: Iterable[str]) -> list[str]:
    """The columns of these names; for a name that none has exactly, the one that differs in upper and lower case alone."""
    columns, found = list(columns), []
    for name in names:
        near = [name] if name in columns else [column for column in columns if column.lower() == name.lower()]
        found += near if len(near) == 1 else []
    return list(dict.fromkeys(found))


def find_column(table: Table, *names: str) -> str:
    """The first of `names` that the table has, as `with_names` matches; a CSV's columns also answer to their position."""
    for name in names:
        if found := with_names(table.columns, [name]):
            return found[0]
        if not table.typed and name.isdecimal() and int(name) < len(table.columns):
            return table.columns[int(name)]
    asked = " or ".join(repr(name) for name in names)
    raise DataError(f"{table.name} has no column {asked}; {_known(table)}.{meant(names[0], table.columns)}")


def _known(table: Table) -> str:
    first = f" (no header was recognised; the first row is: {table.first})" if table.first else ""
    return f"the columns are {listed(table.columns)}{first}"


# Words of messages


def meant(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean {close[0]}?" if close else ""


def listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names)) or "none"


def shown(value: Any) -> str:
    if value is None:
        return "nothing (null)"
    if isinstance(value, float) and math.isnan(value):
        return "NaN"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:60] + '...'}"
