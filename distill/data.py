"""Texts, sentence pairs, retrieval sets and labelled texts from files, data sets and Python lists.

Whitespace-only texts are left out and counted, and so are duplicates among training texts; a row that cannot be used is named
as `tables` names it.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.errors import DataError
from distill.tables.files import read_lines, refuse_missing
from distill.tables.sources import Source, read_table, read_tables
from distill.tables.table import Place, Table, column_names, find_column, meant, shown, text_columns, with_names

# Texts


@dataclass(frozen=True, kw_only=True)
class SourceReport:
    """What became of one source: rows read, and of their texts those kept, empty or seen before."""

    source: str
    commit: str | None = None  # of a Hub data set
    rows: int
    kept: int
    empty: int
    duplicates: int
    bare: tuple[str, ...] = ()  # columns that were read of a CSV without a known header

    def __str__(self) -> str:
        counts = f"{self.kept:,} texts from {self.rows:,} rows ({self.empty:,} empty and {self.duplicates:,} duplicates left out)"
        return f"{self.source}: {counts}{f'; {self.note()}' if self.bare else ''}"

    def note(self) -> str:
        columns = f"column {self.bare[0]} is" if len(self.bare) == 1 else f"columns {' and '.join(self.bare)} are"
        return f"no header was recognised, {columns} read, and the first row is taken as data"


@dataclass(frozen=True, kw_only=True)
class TextReport:
    """The sum over all sources; `str()` is one line for people, which names the commits of Hub data sets."""

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
        pinned = [source.source for source in self.sources if source.commit]
        whole = SourceReport(
            source=f"{len(self.sources)} sources" + (f" with {', '.join(pinned)}" if pinned else ""),
            rows=self.rows,
            kept=self.kept,
            empty=self.empty,
            duplicates=self.duplicates,
        )
        return "; ".join([str(whole), *(f"{source.source}: {source.note()}" for source in self.sources if source.bare)])


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Texts in the order of their first appearance, unique unless duplicates were asked for."""

    texts: list[str]
    report: TextReport

    def __len__(self) -> int:
        return len(self.texts)


def load_texts(
    source: Source | Sequence[Source | Sequence[str]],
    *,
    column: str | None = None,
    limit: int | None = None,
    unique: bool = True,
    revision: str | None = None,
    token: str | None = None,
) -> Texts:
    """Unique texts from a file, a glob, a data set, a list of texts, or a list of these.

    Formats: JSONL, CSV, TSV (unquoted), TXT, each also with .gz, and Parquet; a `datasets.Dataset`, or the folder that its
    `save_to_disk` wrote. A Hub data set is "org/name@REVISION:config:split"; `revision` is of those that name none.
    `column` names one column or several ("sentence1,sentence2"; by position in CSV: "0,1"); by default it is `text`, else
    `sentence1` and `sentence2`, else the only text column, else both sentences of a CSV of pairs without a header. A tuple
    is one of sources. A list is read as texts unless all its items look like sources: paths, names of files, lists,
    "org/name:config:split". `limit` counts kept texts. `unique=False` keeps every text, duplicates too, so that rows stay
    aligned with the file; an empty one is then a DataError.
    """
    if limit is not None and limit < 1:
        raise DataError(f"limit is the number of texts to keep, at least 1; got {limit}. None keeps all.")
    kept: list[str] = []
    seen: set[str] | None = set() if unique else None
    reports = []
    for table in read_tables(source, revision=revision, token=token, wanted=column_names(column)):
        reports.append(_collect(table, column, kept, seen, limit))
        if len(kept) == limit:
            break
    report = TextReport(sources=tuple(reports))
    if not kept:
        raise DataError(f"There is no text to use. {report}.")
    return Texts(texts=kept, report=report)


def _collect(
    table: Table, column: str | None, kept: list[str], seen: set[str] | None, limit: int | None
) -> SourceReport:
    """Put a table's texts behind those of `kept`. With `seen`, the empty and the repeated ones are left out."""
    columns = text_columns(table, column)
    rows = empty = duplicates = 0
    before = len(kept)
    for number, row in table.rows:
        rows += 1
        for name in columns:
            text = table.text(number, row, name)
            blank = not text.strip()
            if blank and seen is None:
                raise DataError(
                    f"{table.at(number, name)}: the text is empty, and leaving it out would move the rows below it. "
                    "Give it a text, or take the row out here and in what belongs to it."
                )
            if blank:
                empty += 1
            elif seen is not None and text in seen:
                duplicates += 1
            elif limit is None or len(kept) < limit:
                kept.append(text)
                if seen is not None:
                    seen.add(text)
        if len(kept) == limit:
            break
    return SourceReport(
        source=table.name,
        commit=table.commit,
        rows=rows,
        kept=len(kept) - before,
        empty=empty,
        duplicates=duplicates,
        bare=tuple(columns) if table.first else (),
    )


# Pairs with a score


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Two sentences and how alike people found them, row by row. `empty` rows were left out.

    `source` is where they come from; a Hub data set with its commit.
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
    return Pairs(
        sentence1=pairs.sentence1, sentence2=pairs.sentence2, score=pairs.score, empty=empty, source=table.name
    )


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


# Retrieval


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """Documents, queries, and which document is how relevant to which query: qrels[query id][document id] = grade.

    `source` is where the three come from; a Hub data set with its commit.
    """

    corpus_ids: list[str]
    corpus: list[str]
    query_ids: list[str]
    queries: list[str]
    qrels: dict[str, dict[str, int]]
    empty: int = 0  # documents and queries without text, left out
    unknown: int = 0  # judgements of documents or queries that do not exist, left out
    source: str = ""

    def __str__(self) -> str:
        judged = sum(map(len, self.qrels.values()))
        return (
            f"{len(self.corpus):,} documents, {len(self.queries):,} queries ({len(self.qrels):,} judged), {judged:,} "
            f"judgements; left out: {self.unknown:,} judgements of unknown ids, {self.empty:,} empty texts"
        )


def load_retrieval(corpus: Source, queries: Source, qrels: str | Path) -> Retrieval:
    """Documents and queries with columns id (or _id), text and perhaps title (put before the text); TREC or BEIR qrels.

    Documents and queries come from files or Hub data sets, judgements from a file.
    Negative grades, which TREC gives to junk, count as 0. Judgements of ids that do not exist are left out and counted.
    """
    corpus_ids, documents, empty_documents, corpus_name = _identified(corpus)
    query_ids, texts, empty_queries, queries_name = _identified(queries)
    judgements, unknown = _qrels(Path(qrels), set(query_ids), set(corpus_ids))
    return Retrieval(
        corpus_ids=corpus_ids,
        corpus=documents,
        query_ids=query_ids,
        queries=texts,
        qrels=judgements,
        empty=empty_documents + empty_queries,
        unknown=unknown,
        source=f"{corpus_name}, {queries_name}, {qrels}",
    )


def _identified(source: Source) -> tuple[list[str], list[str], int, str]:
    table = read_table(source, wanted=("id", "_id", "title", "text"))
    name, text = find_column(table, "_id", "id"), find_column(table, "text")
    heading = (with_names(table.columns, ["title"]) or ["title"])[0]
    seen: dict[str, int] = {}
    texts: list[str] = []
    empty = 0
    for number, row in table.rows:
        key = table.cell(number, row, name)
        key = str(key) if isinstance(key, int) and not isinstance(key, bool) else table.text(number, row, name)
        title = table.text(number, row, heading) if row.get(heading) else ""
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
    return list(seen), texts, empty, table.name


def _qrels(path: Path, queries: set[str], documents: set[str]) -> tuple[dict[str, dict[str, int]], int]:
    refuse_missing(path)
    qrels: dict[str, dict[str, int]] = {}
    unknown = total = 0
    for number, line in read_lines(path):
        parts = line.split("\t") if line.count("\t") in (2, 3) else line.split()
        parts = [part.strip() for part in parts]
        if not line.strip() or (number == 1 and parts[-1].lower() in ("score", "relevance", "grade")):
            continue
        if len(parts) not in (3, 4) or not (whole := re.fullmatch(r"([+-]?\d{1,9})(\.0+)?", parts[-1])):
            raise DataError(
                f"{path}, line {number}: expected 'query 0 document grade' (TREC) or 'query document grade' (BEIR) with a "
                f"whole number as grade, got {line.strip()[:80]!r}."
            )
        query, document, grade = parts[0], parts[-2], max(0, int(whole[1]))
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
    """Texts and the number of their class; `names[label]` is its name. `empty` rows were left out.

    `source` is where they come from; a Hub data set with its commit.
    """

    texts: list[str]
    labels: list[int]
    names: list[str]
    test: "Labelled | None" = None
    empty: int = 0
    source: str = ""

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
    texts, found, origins, empty = _labelled_rows(train, text, label, revision, token)
    whole = all(re.fullmatch(r"-?\d{1,9}", name) for name in found)
    names = sorted(set(found), key=int) if whole else sorted(set(found))
    if len(names) < 2:
        raise DataError(
            f"{origins[0].table.name}: its {len(texts):,} texts are of one class, {names[0]!r}; a set has two or more."
        )
    number = {name: index for index, name in enumerate(names)}
    held_out = None
    if test is not None:
        test_texts, test_found, places, test_empty = _labelled_rows(test, text, label, revision, token)
        for name, place in zip(test_found, places, strict=True):
            if name not in number:
                raise DataError(
                    f"{place}: the label {name!r} does not occur in {origins[0].table.name}.{meant(name, names)}"
                )
        test_labels = [number[name] for name in test_found]
        held_out = Labelled(
            texts=test_texts, labels=test_labels, names=names, empty=test_empty, source=places[0].table.name
        )
    labels, source = [number[name] for name in found], origins[0].table.name
    return Labelled(texts=texts, labels=labels, names=names, test=held_out, empty=empty, source=source)


def _labelled_rows(
    source: Source, text: str, label: str | None, revision: str | None, token: str | None
) -> tuple[list[str], list[str], list[Place], int]:
    names = (label,) if label else ("label", "category", "intent")
    table = read_table(source, revision=revision, token=token, wanted=(text, *names))
    text, label = find_column(table, text), find_column(table, *names)
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
        places.append(Place(table, number, label))
    if not texts:
        raise DataError(f"{table.name} holds no labelled text.")
    return texts, labels, places, empty
