"""Texts, sentence pairs, retrieval sets and labelled texts from files, Hub data sets and Python lists.

Every row is checked where it is read, and a row that cannot be used is named as an editor shows it: file, line, column.
Whitespace-only texts are left out and counted; duplicates among training texts are dropped and counted; anything else that
is no text (null, number, NaN, NUL, a lone surrogate, broken UTF-8) is a DataError, because it says that the file is not
what its owner thinks.
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
from distill.hub import dataset_commit

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
HUB_DATA = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(:[\w.-]*){0,2}|[A-Za-z0-9][\w.-]*(:[\w.-]*){2}")


# Texts


@dataclass(frozen=True, kw_only=True)
class SourceReport:
    """What became of one source: rows read, and of their texts those kept, empty or seen before."""

    source: str
    rows: int
    kept: int
    empty: int
    duplicates: int

    def __str__(self) -> str:
        return (
            f"{self.source}: {self.kept:,} texts from {self.rows:,} rows "
            f"({self.empty:,} empty and {self.duplicates:,} duplicates left out)"
        )


@dataclass(frozen=True, kw_only=True)
class TextReport:
    """The sum over all sources; `str()` is one line for people."""

    sources: tuple[SourceReport, ...]

    @property
    def rows(self) -> int:
        return sum(source.rows for source in self.sources)

    @property
    def kept(self) -> int:
        return sum(source.kept for source in self.sources)

    @property
    def empty(self) -> int:
        return sum(source.empty for source in self.sources)

    @property
    def duplicates(self) -> int:
        return sum(source.duplicates for source in self.sources)

    def __str__(self) -> str:
        if len(self.sources) == 1:
            return str(self.sources[0])
        return str(
            SourceReport(
                source=f"{len(self.sources)} sources",
                rows=self.rows,
                kept=self.kept,
                empty=self.empty,
                duplicates=self.duplicates,
            )
        )


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Unique texts in the order of their first appearance."""

    texts: list[str]
    report: TextReport

    def __len__(self) -> int:
        return len(self.texts)


def load_texts(
    source: Source | Sequence[Source | Sequence[str]],
    *,
    column: str | None = None,
    limit: int | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> Texts:
    """Unique texts from a file, a glob, a Hub data set ("org/name:config:split"), a list of texts, or a list of these.

    Formats: JSONL, CSV, TSV (unquoted), TXT, each also with .gz, and Parquet. `column` names one column or several
    ("sentence1,sentence2"; by position in CSV: "0,1"); by default it is `text`, else the only text column, else in CSV all
    columns that do not hold numbers. A list is read as texts unless all its items look like sources: paths, names of files,
    lists, "org/name:config:split". `limit` counts kept texts.
    """
    if limit is not None and limit < 1:
        raise DataError(f"limit is the number of texts to keep, at least 1; got {limit}. None keeps all.")
    kept: dict[str, None] = {}
    reports = []
    for table in _tables(source, revision=revision, token=token, wanted=_split(column)):
        reports.append(_collect(table, column, kept, limit))
        if limit is not None and len(kept) >= limit:
            break
    report = TextReport(sources=tuple(reports))
    if not kept:
        raise DataError(f"There is no text to use. {report}.")
    return Texts(texts=list(kept), report=report)


def _collect(table: "_Table", column: str | None, kept: dict[str, None], limit: int | None) -> SourceReport:
    columns = _chosen(table, column)
    rows = empty = duplicates = 0
    before = len(kept)
    for number, row in table.rows:
        rows += 1
        for name in columns:
            text = table.text(number, row, name)
            if not text.strip():
                empty += 1
            elif text in kept:
                duplicates += 1
            elif limit is None or len(kept) < limit:
                kept[text] = None
        if limit is not None and len(kept) >= limit:
            break
    return SourceReport(source=table.name, rows=rows, kept=len(kept) - before, empty=empty, duplicates=duplicates)


# Pairs with a score


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Two sentences and how alike people found them, row by row. `empty` rows were left out."""

    sentence1: list[str]
    sentence2: list[str]
    score: list[float]
    empty: int = 0

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
    """Sentence pairs with scores, as in STS: columns sentence1, sentence2, score, or the first three of a bare CSV."""
    first, second, score = columns or ("sentence1", "sentence2", "score")
    table = _one_table(source, revision=revision, token=token, wanted=(first, second, score))
    if columns is None and table.columns[:3] == ["0", "1", "2"]:
        first, second, score = "0", "1", "2"
    first, second = _column(table, first), _column(table, second)
    score = _column(table, score, "similarity_score", "label")
    pairs = Pairs(sentence1=[], sentence2=[], score=[])
    empty = 0
    for number, row in table.rows:
        one, two = table.text(number, row, first), table.text(number, row, second)
        value = _number(table, number, row, score)
        if not one.strip() or not two.strip():
            empty += 1
            continue
        pairs.sentence1.append(one)
        pairs.sentence2.append(two)
        pairs.score.append(value)
        if limit is not None and len(pairs) >= limit:
            break
    if not len(pairs):
        raise DataError(f"{table.name} holds no pair of sentences ({empty} rows are empty).")
    return Pairs(sentence1=pairs.sentence1, sentence2=pairs.sentence2, score=pairs.score, empty=empty)


def _number(table: "_Table", number: int, row: dict[str, Any], column: str) -> float:
    value = table.cell(number, row, column)
    try:
        # float() reads "1_000" and True, and neither is meant as a score.
        result = math.nan if isinstance(value, bool) or "_" in str(value) else float(value)
    except (TypeError, ValueError, OverflowError):
        result = math.nan
    if not math.isfinite(result):
        raise DataError(f"{table.at(number, column)}: a finite number is expected, got {_shown(value)}.")
    return result


# Retrieval


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """Documents, queries, and which document is how relevant to which query: qrels[query id][document id] = grade."""

    corpus_ids: list[str]
    corpus: list[str]
    query_ids: list[str]
    queries: list[str]
    qrels: dict[str, dict[str, int]]
    empty: int = 0  # documents and queries without text, left out
    unknown: int = 0  # judgements of documents or queries that do not exist, left out

    def __str__(self) -> str:
        judged = sum(map(len, self.qrels.values()))
        return (
            f"{len(self.corpus):,} documents, {len(self.queries):,} queries ({len(self.qrels):,} judged), {judged:,} "
            f"judgements; left out: {self.unknown:,} judgements of unknown ids, {self.empty:,} empty texts"
        )


def load_retrieval(corpus: Source, queries: Source, qrels: Source) -> Retrieval:
    """Documents and queries with columns id (or _id), text and perhaps title (put before the text); TREC or BEIR qrels.

    Negative grades, which TREC gives to junk, count as 0. Judgements of ids that do not exist are left out and counted.
    """
    corpus_ids, documents, empty_documents = _identified(corpus)
    query_ids, texts, empty_queries = _identified(queries)
    judgements, unknown = _qrels(Path(qrels), set(query_ids), set(corpus_ids))
    return Retrieval(
        corpus_ids=corpus_ids,
        corpus=documents,
        query_ids=query_ids,
        queries=texts,
        qrels=judgements,
        empty=empty_documents + empty_queries,
        unknown=unknown,
    )


def _identified(source: Source) -> tuple[list[str], list[str], int]:
    table = _one_table(source, wanted=("id", "_id", "title", "text"))
    name, text = _column(table, "_id", "id"), _column(table, "text")
    seen: dict[str, int] = {}
    texts: list[str] = []
    empty = 0
    for number, row in table.rows:
        key = table.cell(number, row, name)
        key = str(key) if isinstance(key, int) and not isinstance(key, bool) else table.text(number, row, name)
        title = table.text(number, row, "title") if row.get("title") else ""
        whole = f"{title} {table.text(number, row, text)}".strip()
        if not whole:
            empty += 1
            continue
        if key in seen:
            raise DataError(f"{table.at(number, name)}: the id {key!r} was given before, in {table.unit} {seen[key]}.")
        seen[key] = number
        texts.append(whole)
    if not seen:
        raise DataError(f"{table.name} holds no text with an id.")
    return list(seen), texts, empty


def _qrels(path: Path, queries: set[str], documents: set[str]) -> tuple[dict[str, dict[str, int]], int]:
    qrels: dict[str, dict[str, int]] = {}
    unknown = total = 0
    for number, line in _lines(path):
        parts = line.split("\t") if line.count("\t") in (2, 3) else line.split()
        parts = [part.strip() for part in parts]
        if not line.strip() or (number == 1 and parts[-1].lower() in ("score", "relevance", "grade")):
            continue
        if len(parts) not in (3, 4) or not re.fullmatch(r"[+-]?\d{1,9}", parts[-1]):
            raise DataError(
                f"{path}, line {number}: expected 'query 0 document grade' (TREC) or 'query document grade' (BEIR) with a "
                f"whole number as grade, got {line.strip()[:80]!r}."
            )
        query, document, grade = parts[0], parts[-2], max(0, int(parts[-1]))
        total += 1
        if query not in queries or document not in documents:
            unknown += 1
        elif qrels.setdefault(query, {}).setdefault(document, grade) != grade:
            raise DataError(
                f"{path}, line {number}: {document!r} has grade {grade} for query {query!r}, and "
                f"{qrels[query][document]} further up."
            )
    if not qrels:
        raise DataError(
            f"{path}: none of its {total} judgements names a query and a document that exist. "
            f"Do the files belong together? Query ids look like {sorted(queries)[:3]}, document ids like {sorted(documents)[:3]}."
        )
    return qrels, unknown


# Labelled texts


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """Texts and the number of their class; `names[label]` is its name. `empty` rows were left out."""

    texts: list[str]
    labels: list[int]
    names: list[str]
    test: "Labelled | None" = None
    empty: int = 0

    def __len__(self) -> int:
        return len(self.texts)


def load_labelled(
    train: Source,
    test: Source | None = None,
    *,
    text: str = "text",
    label: str | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> Labelled:
    """Labelled texts; `label` is the column label, category or intent. Classes are numbered by the sorted names of `train`."""
    texts, found, _, empty = _labelled_rows(train, text, label, revision, token)
    whole = all(re.fullmatch(r"-?\d{1,9}", name) for name in found)
    names = sorted(set(found), key=int) if whole else sorted(set(found))
    number = {name: index for index, name in enumerate(names)}
    held_out = None
    if test is not None:
        test_texts, test_found, places, test_empty = _labelled_rows(test, text, label, revision, token)
        for name, place in zip(test_found, places, strict=True):
            if name not in number:
                raise DataError(f"{place}: the label {name!r} does not occur in {train}.{_meant(name, names)}")
        test_labels = [number[name] for name in test_found]
        held_out = Labelled(texts=test_texts, labels=test_labels, names=names, empty=test_empty)
    return Labelled(texts=texts, labels=[number[name] for name in found], names=names, test=held_out, empty=empty)


def _labelled_rows(
    source: Source, text: str, label: str | None, revision: str | None, token: str | None
) -> tuple[list[str], list[str], "list[_Place]", int]:
    names = (label,) if label else ("label", "category", "intent")
    table = _one_table(source, revision=revision, token=token, wanted=(text, *names))
    text, label = _column(table, text), _column(table, *names)
    texts, labels, places, empty = [], [], [], 0
    for number, row in table.rows:
        value = table.cell(number, row, label)
        value = str(value) if isinstance(value, int) and not isinstance(value, bool) else table.text(number, row, label)
        one = table.text(number, row, text)
        if not one.strip():
            empty += 1
            continue
        if not value.strip():
            raise DataError(f"{table.at(number, label)}: the label is empty.")
        texts.append(one)
        labels.append(value)
        places.append(_Place(table, number, label))
    if not texts:
        raise DataError(f"{table.name} holds no labelled text.")
    return texts, labels, places, empty


# Tables: named rows, wherever they come from


@dataclass(frozen=True, kw_only=True)
class _Table:
    name: str
    unit: str  # what `number` counts: a line of a text file, a row of a table, an item of a list
    columns: list[str]
    rows: Iterator[Row]
    sample: list[Row] = field(default_factory=list)
    typed: bool = True  # False where every cell is a string, so that numbers have to be guessed
    first: str = ""  # the first row of a CSV without a known header, to show in messages

    def at(self, number: int, column: str) -> str:
        return f"{self.name}, {self.unit} {number}, column {column!r}"

    def cell(self, number: int, row: dict[str, Any], column: str) -> Any:
        if column not in row:
            raise DataError(f"{self.name}, {self.unit} {number}: there is no {column!r}, only {_listed(row)}.")
        return row[column]

    def text(self, number: int, row: dict[str, Any], column: str) -> str:
        """The cell, if it is a text that a tokenizer can take."""
        value = self.cell(number, row, column)
        if not isinstance(value, str):
            raise DataError(f"{self.at(number, column)}: a text is expected, got {_shown(value)}.")
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
class _Place:
    table: _Table
    number: int
    column: str

    def __str__(self) -> str:
        return self.table.at(self.number, self.column)


def _tables(
    source: Any, *, revision: str | None = None, token: str | None = None, wanted: tuple[str, ...] = ()
) -> Iterator[_Table]:
    """One table for each file, data set or list of texts; each is opened when its turn comes."""
    if isinstance(source, Path):
        yield _file(source, wanted)
    elif isinstance(source, str):
        if set("*?[") & set(source) and not Path(source).is_file():
            paths = [Path(path) for path in sorted(glob(source, recursive=True))]
            if not (files := [path for path in paths if path.is_file()]):
                raise DataError(f"No file matches {source}.")
            for path in files:
                yield _file(path, wanted)
        elif HUB_DATA.fullmatch(source) and not _is_data_name(source) and not Path(source).exists():
            yield _hub_data(source, revision, token, wanted)
        else:
            yield _file(Path(source).expanduser(), wanted)
    elif not isinstance(source, Sequence):
        raise DataError(f"Texts come from a path, a name or a list, not from {type(source).__name__}.")
    elif _are_sources(source):
        for item in source:
            if isinstance(item, Source):
                yield from _tables(item, revision=revision, token=token, wanted=wanted)
            else:
                yield _listed_texts(item)
    else:
        yield _listed_texts(source)


def _listed_texts(texts: Sequence[Any]) -> _Table:
    rows = ((number, {"text": text}) for number, text in enumerate(texts, 1))
    return _Table(name="list of texts", unit="item", columns=["text"], rows=rows)


def _one_table(source: Source, **options: Any) -> _Table:
    tables = list(islice(_tables(source, **options), 2))
    if len(tables) != 1:
        raise DataError(f"One file is expected, {source} matches several.")
    return tables[0]


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
                f"A list holds either texts or sources, this one holds both: {str(item)!r} and {_shown(other)} "
                f"(item {likely.index(False) + 1}). Known file endings: {', '.join(SUFFIXES)}, each also with .gz."
            )
    return False


def _file(path: Path, wanted: tuple[str, ...]) -> _Table:
    readers: dict[str, Callable[[Path, tuple[str, ...]], _Table]] = {
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
        raise DataError(f"{path} {kind}.{_meant(path.name, near)}")
    if suffix not in readers:
        raise DataError(f"{path}: cannot tell the format from the ending {suffix!r}; known are {', '.join(SUFFIXES)}.")
    return readers[suffix](path, wanted)


# Readers


def _lines(path: Path) -> Iterator[tuple[int, str]]:
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


def _txt(path: Path, wanted: tuple[str, ...]) -> _Table:
    rows = ((number, {"text": line.rstrip("\r\n")}) for number, line in _lines(path))
    return _Table(name=str(path), unit="line", columns=["text"], rows=rows)


def _jsonl(path: Path, wanted: tuple[str, ...]) -> _Table:
    def objects() -> Iterator[Row]:
        for number, line in _lines(path):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}, line {number}: no JSON ({error or 'nested too deep'}).") from None
            if not isinstance(value, dict):
                raise DataError(
                    f'{path}, line {number}: an object such as {{"text": ...}} is expected, got {_shown(value)}.'
                )
            yield number, value

    return _sampled(_Table(name=str(path), unit="line", columns=[], rows=objects()))


def _csv(path: Path, wanted: tuple[str, ...]) -> _Table:
    # The limit of 131,072 characters a cell is global to the csv module, and a long document exceeds it.
    csv.field_size_limit(LONGEST_LINE)
    tabs = Path(path.name.lower().removesuffix(".gz")).suffix == ".tsv"
    lines = (line for _, line in _lines(path))
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
    return _sampled(_Table(name=str(path), unit="line", columns=columns, rows=named(), typed=False, first=shown))


def _parquet(path: Path, wanted: tuple[str, ...]) -> _Table:
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

    return _sampled(_Table(name=str(path), unit="row", columns=list(types), rows=rows()))


def _hub_data(name: str, revision: str | None, token: str | None, wanted: tuple[str, ...]) -> _Table:
    """A split of a Hub data set, "org/name:config:split"; `train` and the default configuration unless named."""
    from datasets import ClassLabel, load_dataset

    repository, config, split = (*name.split(":"), "", "")[:3]
    commit = dataset_commit(repository, revision=revision, token=token) or revision
    try:
        data = load_dataset(repository, config or None, split=split or "train", revision=commit, token=token)
    except ValueError as error:  # an unknown configuration or split; the message lists those there are
        raise DataError(f"{name}: {error}") from error
    except Exception as error:  # the stack below raises the errors of four libraries
        raise ResourceError(
            f"Cannot get the data set {name}: {type(error).__name__}: {error}. Check its name and the network, set HF_TOKEN "
            "if it is private, or give the path of a local file."
        ) from error
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

    return _sampled(_Table(name=name, unit="row", columns=columns, rows=rows()))


def _sampled(table: _Table) -> _Table:
    """The table with its first rows looked at, by which columns are chosen."""
    sample = list(islice(table.rows, SAMPLE_ROWS))
    columns = table.columns or list(dict.fromkeys(key for _, row in sample for key in row))
    if not sample:
        raise DataError(f"{table.name} is empty: there is no row in it.")
    return _Table(
        name=table.name,
        unit=table.unit,
        columns=columns,
        rows=chain(sample, table.rows),
        sample=sample,
        typed=table.typed,
        first=table.first,
    )


# Columns


def _split(column: str | None) -> tuple[str, ...]:
    return () if column is None else (column, *(part.strip() for part in column.split(",")))


def _chosen(table: _Table, column: str | None) -> list[str]:
    """The columns to take texts from."""
    if table.columns == ["text"]:
        return ["text"]
    if column is not None:
        names = [column] if column in table.columns else [part.strip() for part in column.split(",")]
        chosen = [_column(table, name) for name in names]
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
    raise DataError(f"{table.name}: {what}; the columns are {_listed(table.columns)}. Say which: column=...")


def _holds_text(table: _Table, column: str) -> bool:
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


def _column(table: _Table, *names: str) -> str:
    """The first of `names` that the table has; a CSV's columns also answer to their position."""
    for name in names:
        if name in table.columns:
            return name
        if not table.typed and name.isdecimal() and int(name) < len(table.columns):
            return table.columns[int(name)]
    asked = " or ".join(repr(name) for name in names)
    first = f" (no header was recognised; the first row is: {table.first})" if table.first else ""
    raise DataError(
        f"{table.name} has no column {asked}; the columns are {_listed(table.columns)}{first}.{_meant(names[0], table.columns)}"
    )


# Words of messages


def _meant(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean {close[0]}?" if close else ""


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names)) or "none"


def _shown(value: Any) -> str:
    if value is None:
        return "nothing (null)"
    if isinstance(value, float) and math.isnan(value):
        return "NaN"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:60] + '...'}"
