"""Tables: named rows from JSONL, CSV, TSV, TXT, Parquet, Hub data sets and lists, and what is wrong with row 1,234.

A cell is checked where it is read, and one that cannot be used is named as an editor shows it: file, line, column. What is no
text (null, number, NaN, NUL, a lone surrogate, broken UTF-8) is a DataError, because it says that the file is not what its
owner thinks.
"""

import csv
import difflib
import gzip
import json
import math
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from glob import glob
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

from distill.errors import DataError, ResourceError
from distill.hub import COMMIT, dataset_commit

Source = str | Path
Row = tuple[int, dict[str, Any]]

SAMPLE_ROWS = 1000  # as many rows are looked at to tell text columns from number columns
LONGEST_LINE = 1 << 28  # bytes; a longer "line" is a binary file or a bomb
SUFFIXES = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".txt")
# A CSV has a header when its first row holds one of these, or a column that is asked for.
HEADER_NAMES = {
    "text",
    "sentence",
    "sentence1",
    "sentence2",
    "score",
    "similarity_score",
    "label",
    "category",
    "intent",
}
HEADER_NAMES |= {"query", "question", "answer", "document", "passage", "title", "content", "premise", "hypothesis"}
HEADER_NAMES |= {"id", "_id"}
# NAME or NAME@REVISION, then :CONFIG:SPLIT; without an ORG/ in front, both colons are there.
HUB_DATA = re.compile(
    r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?(:[\w.-]*){0,2}|[A-Za-z0-9][\w.-]*(@[\w./-]+)?(:[\w.-]*){2}"
)


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
                f"{self.at(number, column)}: the text holds a NUL character at position {value.index(chr(0))}."
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


def read_tables(
    source: Any, *, revision: str | None = None, token: str | None = None, wanted: tuple[str, ...] = ()
) -> Iterator[Table]:
    """One table for each file, data set or list of texts; each is opened when its turn comes. A tuple is one of sources.

    `revision` is of the Hub data sets that name none.
    """
    if isinstance(source, Path):
        yield _file(source, wanted)
    elif isinstance(source, str):
        if set("*?[") & set(source) and not Path(source).is_file():
            paths = [Path(path) for path in sorted(glob(source, recursive=True))]
            if not (files := [path for path in paths if path.is_file()]):
                raise DataError(f"No file matches {source}.")
            for path in files:
                yield _file(path, wanted)
        elif _is_hub_data(source):
            yield _hub_data(source, revision, token, wanted)
        else:
            yield _file(Path(source).expanduser(), wanted)
    elif not isinstance(source, Sequence):
        raise DataError(f"Texts come from a path, a name or a list, not from {type(source).__name__}.")
    elif isinstance(source, tuple) or _are_sources(source):
        for item in source:
            if isinstance(item, Source):
                yield from read_tables(item, revision=revision, token=token, wanted=wanted)
            else:
                yield _listed_texts(item)
    else:
        yield _listed_texts(source)


def _listed_texts(texts: Sequence[Any]) -> Table:
    rows = ((number, {"text": text}) for number, text in enumerate(texts, 1))
    return Table(name="list of texts", unit="item", columns=["text"], rows=rows, unnamed=True)


def read_table(source: Source, **options: Any) -> Table:
    tables = list(islice(read_tables(source, **options), 2))
    if len(tables) != 1:
        raise DataError(f"One file is expected, {source} matches several.")
    return tables[0]


def without_revision(source: str) -> str:
    """A Hub data set's name whatever its revision; any other source as it is."""
    return re.sub(r"@[^:]*", "", source) if _is_hub_data(source) else source


def _is_hub_data(source: str) -> bool:
    return bool(HUB_DATA.fullmatch(source)) and not _is_data_name(source) and not Path(source).exists()


def _is_data_name(name: str) -> bool:
    return name.lower().removesuffix(".gz").endswith(SUFFIXES)


def _are_sources(items: Sequence[Any]) -> bool:
    """Whether a list holds sources rather than texts; a list that could be both by mistake is refused."""
    # "and/or" is a text: in a list, a Hub data set is written with its split, "org/name::train".
    likely = [
        (_is_data_name(item) or bool(HUB_DATA.fullmatch(item) and item.count(":") == 2))
        if isinstance(item, str)
        else isinstance(item, Path | list | tuple)
        for item in items
    ]
    if all(likely):
        return bool(items)
    for index, item in enumerate(items):
        if likely[index] and (not isinstance(item, str) or (_is_data_name(item) and Path(item).is_file())):
            other = items[likely.index(False)]
            raise DataError(
                f"A list holds either texts or sources, this one holds both: {str(item)!r} and {shown(other)} "
                f"(item {likely.index(False) + 1}). Known file endings: {', '.join(SUFFIXES)}, each also with .gz."
            )
    return False


def _file(path: Path, wanted: tuple[str, ...]) -> Table:
    readers: dict[str, Callable[[Path, tuple[str, ...]], Table]] = {
        ".jsonl": _jsonl,
        ".ndjson": _jsonl,
        ".csv": _csv,
        ".tsv": _csv,
        ".parquet": _parquet,
        ".txt": _txt,
    }
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    if not path.is_file():
        near = [item.name for item in path.parent.iterdir()] if path.parent.is_dir() else []
        kind = "is a folder" if path.is_dir() else "does not exist"
        raise DataError(f"{path} {kind}.{meant(path.name, near)}")
    if suffix not in readers:
        raise DataError(f"{path}: cannot tell the format from the ending {suffix!r}; known are {', '.join(SUFFIXES)}.")
    return readers[suffix](path, wanted)


# Readers


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines without their ends, decoded one by one, so that broken bytes can be named by their line."""
    number = 0
    try:
        with _opened(path) as file:
            while line := file.readline(LONGEST_LINE):
                number += 1
                if len(line) == LONGEST_LINE:
                    raise DataError(f"{path}, line {number}: longer than {LONGEST_LINE >> 20} MB. Is it a text file?")
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        hint = " The file looks like UTF-16." if number == 1 and error.object[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        raise DataError(
            f"{path}, line {number}: byte {error.object[error.start]:#04x} at position {error.start} is no UTF-8.{hint} "
            f"Convert the file: iconv -f ENCODING -t UTF-8 {path.name}"
        ) from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"{path}: the gzip stream is damaged after line {number} ({error}). Copy the file anew."
        ) from error
    except OSError as error:
        raise ResourceError(f"{path} cannot be read after line {number}: {error.strerror or error}.") from error


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        if not packed:
            yield file
            return
        with gzip.open(file) as unpacked:
            yield unpacked  # type: ignore[misc]  # GzipFile reads bytes as IO[bytes] does


def _txt(path: Path, wanted: tuple[str, ...]) -> Table:
    rows = ((number, {"text": line.rstrip("\r\n")}) for number, line in read_lines(path))
    return Table(name=str(path), unit="line", columns=["text"], rows=rows, unnamed=True)


def _jsonl(path: Path, wanted: tuple[str, ...]) -> Table:
    def objects() -> Iterator[Row]:
        for number, line in read_lines(path):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}, line {number}: no JSON ({error or 'nested too deep'}).") from None
            if not isinstance(value, dict):
                raise DataError(
                    f'{path}, line {number}: an object such as {{"text": ...}} is expected, got {shown(value)}.'
                )
            yield number, value

    return _sampled(Table(name=str(path), unit="line", columns=[], rows=objects()))


def _csv(path: Path, wanted: tuple[str, ...]) -> Table:
    # The limit of 131,072 characters a cell is global to the csv module, and a long document exceeds it.
    csv.field_size_limit(LONGEST_LINE)
    tabs = Path(path.name.lower().removesuffix(".gz")).suffix == ".tsv"
    lines = (line for _, line in read_lines(path))
    # strict: a quote that is never closed would otherwise swallow the rest of the file without a word.
    reader = csv.reader(
        lines, delimiter="\t" if tabs else ",", quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL, strict=True
    )

    def records() -> Iterator[tuple[int, list[str]]]:
        while True:
            start = reader.line_num + 1
            try:
                cells = next(reader, None)
            except csv.Error as error:
                raise DataError(f"{path}: the row that starts in line {start} is no sound CSV ({error}).") from None
            if cells is None:
                return
            yield start, cells

    rows = records()
    number, first = next(((number, cells) for number, cells in rows if cells), (0, []))
    header = bool({cell.strip().lower() for cell in first} & HEADER_NAMES or set(wanted) & set(first))
    columns = [cell.strip() for cell in first] if header else [str(index) for index in range(len(first))]
    if len(set(columns)) < len(columns):
        raise DataError(f"{path}, line {number}: two columns have one name: {', '.join(columns)}.")

    def named() -> Iterator[Row]:
        for number, cells in rows if header else chain([(number_of_first, first)] if first else [], rows):
            if not cells:
                cells = [""] * len(columns)  # a blank line is an empty row
            if len(cells) != len(columns):
                raise DataError(
                    f"{path}, line {number}: {len(cells)} cells, but {len(columns)} in the first row. "
                    "A text with a comma has to stand in quotes."
                )
            yield number, dict(zip(columns, cells, strict=True))

    number_of_first = number
    shown = "" if header else ", ".join(first)[:80]
    return _sampled(Table(name=str(path), unit="line", columns=columns, rows=named(), typed=False, first=shown))


def _parquet(path: Path, wanted: tuple[str, ...]) -> Table:
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is no Parquet file ({str(error).splitlines()[0]}).") from error
    types = {item.name: item.type for item in file.schema_arrow}
    texts = [name for name, kind in types.items() if name == "text" or "string" in str(kind)]  # also of dictionaries
    read = [name for name in types if name in wanted] or texts

    def rows() -> Iterator[Row]:
        number = 0
        try:
            for batch in file.iter_batches(batch_size=1024, columns=read):
                cells = [batch.column(index) for index in range(batch.num_columns)]
                for index in range(batch.num_rows):
                    number += 1
                    yield (
                        number,
                        {name: cell[index].as_py() for name, cell in zip(batch.schema.names, cells, strict=True)},
                    )
        except UnicodeDecodeError:
            raise DataError(f"{path}, row {number}: a text is no UTF-8.") from None
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{path} is damaged after row {number} ({str(error).splitlines()[0]}).") from error

    return _sampled(Table(name=str(path), unit="row", columns=list(types), rows=rows()))


def _hub_data(name: str, revision: str | None, token: str | None, wanted: tuple[str, ...]) -> Table:
    """A split of a Hub data set, "org/name@REVISION:config:split"; `main`, the default and `train` if none is named.

    The table's name has the commit that was read in place of the revision, where it is known.
    """
    from datasets import ClassLabel

    whole, config, split = (*name.split(":"), "", "")[:3]
    repository, _, named = whole.partition("@")
    revision = dataset_commit(repository, revision=named or revision, token=token) or named or revision
    data = _fetched(name, repository, config or None, split=split or "train", revision=revision, token=token)
    commit = _commit_read(data) or revision
    if revision and COMMIT.fullmatch(revision) and commit != revision:
        raise ResourceError(
            f"Cannot get the data set {name}: `datasets` fell back on what it has, commit {commit}, and {revision} was asked for. "
            f"Unset HF_HUB_OFFLINE and try again, or name {repository}@{commit}."
        )
    title = name.replace(whole, f"{repository}@{commit}", 1) if commit else name
    columns = list(data.column_names)
    texts = [name for name in columns if name == "text" or getattr(data.features[name], "dtype", "") == "string"]
    data = data.select_columns([name for name in columns if name in wanted] or texts)  # pictures stay undecoded
    classes = {key: value for key, value in data.features.items() if isinstance(value, ClassLabel)}

    def rows() -> Iterator[Row]:
        for number, row in enumerate(data, 1):
            for key, kind in classes.items():
                if isinstance(row[key], int) and row[key] >= 0:
                    row[key] = kind.int2str(row[key])
            yield number, row

    return _sampled(Table(name=title, unit="row", columns=columns, rows=rows()))


def _fetched(name: str, *place: str | None, **options: Any) -> Any:
    """`load_dataset(*place, **options)`, with what goes wrong told of `name`."""
    from datasets import load_dataset

    try:
        return load_dataset(*place, **options)
    except ValueError as error:  # an unknown configuration or split; the message lists those there are
        raise DataError(f"{name}: {error}") from error
    except Exception as error:  # the stack below raises the errors of four libraries
        raise ResourceError(
            f"Cannot get the data set {name}: {type(error).__name__}: {error}. Check its name and the network, set HF_TOKEN "
            "if it is private, or give the path of a local file."
        ) from error


def _commit_read(data: Any) -> str | None:
    """The commit of the rows, by which `datasets` names a folder: it takes the newest it has if it gets no other."""
    folder = Path(data.cache_files[0]["filename"]).parent.name if data.cache_files else ""
    return folder if COMMIT.fullmatch(folder) else None


def _sampled(table: Table) -> Table:
    """The table with its first rows looked at, by which columns are chosen."""
    sample = list(islice(table.rows, SAMPLE_ROWS))
    columns = table.columns or list(dict.fromkeys(key for _, row in sample for key in row))
    if not sample:
        raise DataError(f"{table.name} is empty: there is no row in it.")
    return Table(
        name=table.name,
        unit=table.unit,
        columns=columns,
        rows=chain(sample, table.rows),
        sample=sample,
        typed=table.typed,
        first=table.first,
    )


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
    if "text" in table.columns:
        return ["text"]
    texts = [name for name in table.columns if _holds_text(table, name)]
    if len(texts) == 1 or (texts and not table.typed):
        return texts
    what = "several columns hold text" if texts else "no column holds text"
    raise DataError(f"{table.name}: {what}; the columns are {listed(table.columns)}. Say which: column=...")


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


def find_column(table: Table, *names: str) -> str:
    """The first of `names` that the table has; a CSV's columns also answer to their position."""
    for name in names:
        if name in table.columns:
            return name
        if not table.typed and name.isdecimal() and int(name) < len(table.columns):
            return table.columns[int(name)]
    asked = " or ".join(repr(name) for name in names)
    first = f" (no header was recognised; the first row is: {table.first})" if table.first else ""
    raise DataError(
        f"{table.name} has no column {asked}; the columns are {listed(table.columns)}{first}.{meant(names[0], table.columns)}"
    )


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
