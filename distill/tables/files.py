"""Tables from files: JSONL, CSV, TSV and TXT, each also with .gz, and Parquet."""

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import IO

from distill.errors import DataError, ResourceError
from distill.tables.table import Row, Table, meant, sampled, shown, with_names

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


def is_data_name(name: str) -> bool:
    return name.lower().removesuffix(".gz").endswith(SUFFIXES)


def file_table(path: Path, wanted: tuple[str, ...]) -> Table:
    readers: dict[str, Callable[[Path, tuple[str, ...]], Table]] = {
        ".jsonl": _jsonl,
        ".ndjson": _jsonl,
        ".csv": _csv,
        ".tsv": _csv,
        ".parquet": _parquet,
        ".txt": _txt,
    }
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    refuse_missing(path)
    if suffix not in readers:
        raise DataError(f"{path}: cannot tell the format from the ending {suffix!r}; known are {', '.join(SUFFIXES)}.")
    return readers[suffix](path, wanted)


def refuse_missing(path: Path) -> None:
    """DataError if there is no file of this name."""
    if path.is_dir():
        raise DataError(f"{path} is a folder; name a file in it, or several: {path / '*.parquet'}")
    if not path.is_file():
        near = [item.name for item in path.parent.iterdir()] if path.parent.is_dir() else []
        texts = " Texts themselves are given as a list; a tuple is one of sources." if " " in path.name else ""
        raise DataError(f"{path} does not exist.{meant(path.name, near)}{texts}")


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

    return sampled(Table(name=str(path), unit="line", columns=[], rows=objects()))


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
    header = _is_header(first, wanted)
    if len(first) == 1:
        _refuse_other_delimiter(f"{path}, line {number}", first)
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
                    + ("A text cannot hold a tab." if tabs else "A text with a comma has to stand in quotes.")
                )
            yield number, dict(zip(columns, cells, strict=True))

    number_of_first = number
    shown = "" if header else ", ".join(first)[:80]
    table = sampled(Table(name=str(path), unit="line", columns=columns, rows=named(), typed=False, first=shown))
    if len(columns) == 1:
        cells = [row[columns[0]] for _, row in table.sample[:10]]
        _refuse_other_delimiter(f"{path}, line {number}", [*first, *cells] if header else cells)
    if tabs:
        rows_seen = [[*row.values()] for _, row in table.sample[:10]]
        _refuse_quotes(f"{path}, line {number}", [first, *rows_seen] if header else rows_seen)
    return table


def _is_header(cells: Sequence[str], wanted: Sequence[str] = ()) -> bool:
    """Known names, or those asked for; numbers are places, but where they number all columns, as pandas does."""
    found = [cell.strip().lower() for cell in cells]
    names = {*HEADER_NAMES, *(name.lower() for name in wanted if not name.strip().isdecimal())}
    return bool(names & {*found}) or (bool({*wanted} & {*found}) and found == [str(i) for i in range(len(found))])


def _refuse_quotes(place: str, rows: list[list[str]]) -> None:
    """DataError where the cells of a column all stand in quotes, or two do and double those within."""
    for column in zip(*rows, strict=True):
        filled = [cell for cell in column if cell.strip()]
        quoted = [cell for cell in filled if len(cell) > 1 and cell[0] == cell[-1] == '"']
        if (len(quoted) == len(filled) > 1) or sum('""' in cell[1:-1] for cell in quoted) > 1:
            raise DataError(
                f"{place}: cells stand in quotes ({shown(quoted[0])}), and a .tsv is read unquoted. Write it without quotes, "
                "or as .csv or .jsonl."
            )


def _refuse_other_delimiter(place: str, cells: list[str]) -> None:
    """DataError where rows of one cell look like rows of several, parted by something else."""
    filled = [cell for cell in cells if cell.strip()]
    for mark, name in {";": "semicolons", "\t": "tabs", "|": "bars"}.items():
        counts = {cell.count(mark) for cell in filled}
        alike = len(filled) > 1 and len(counts) == 1 and counts != {0}
        prose = alike and all(f"{mark} " in cell for cell in filled)
        names = [name.strip() for name in filled[0].split(mark)] if filled and mark in filled[0] else []
        if (alike and not prose) or (all(map(str.isidentifier, names)) and _is_header(names)):
            raise DataError(
                f"{place}: one column, whose cells look parted by {name} ({shown(filled[0])}). A .csv is parted by commas, "
                "a .tsv by tabs: write the file anew, or rename it. Texts that hold such marks are read below a line 'text', or from .txt or .jsonl."
            )


def _parquet(path: Path, wanted: tuple[str, ...]) -> Table:
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is no Parquet file ({str(error).splitlines()[0]}).") from error
    types = {item.name: item.type for item in file.schema_arrow}
    strings = [name for name, kind in types.items() if "string" in str(kind)]  # also of dictionaries
    read = with_names(types, wanted) or with_names(types, ["text", *strings])

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

    return sampled(Table(name=str(path), unit="row", columns=list(types), rows=rows()))
