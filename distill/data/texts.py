"""Texts from any number of sources. Whitespace-only ones and repeated ones are left out and counted."""

from collections.abc import Sequence
from dataclasses import dataclass

from distill.errors import DataError
from distill.tables.sources import Source, read_tables
from distill.tables.table import Table, column_names, text_columns


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
class LoadedTexts:
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
) -> LoadedTexts:
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
    named = column in (None, "text")
    for table in read_tables(source, revision=revision, token=token, wanted=column_names(column)):
        named = named or not table.unnamed
        reports.append(_collect(table, column, kept, seen, limit))
        if len(kept) == limit:
            break
    if not named and reports and len(kept) != limit:  # at the limit, sources that have columns may not have been opened
        raise DataError(f"{reports[0].source} has no columns, and {column!r} was asked for. Leave the column out.")
    report = TextReport(sources=tuple(reports))
    if not kept:
        raise DataError(f"There is no text to use. {report}.")
    return LoadedTexts(texts=kept, report=report)


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
