"""Which table a source is: a file, a glob, a data set, a list of texts, or several of these."""

import os
import re
from collections.abc import Iterator, Sequence
from glob import glob
from itertools import islice
from pathlib import Path
from typing import Any

from distill.errors import DataError
from distill.tables.files import SUFFIXES, file_table, is_data_name
from distill.tables.hub_data import HUB_DATA, DataSet, dataset_table, hub_table, is_saved, saved_table
from distill.tables.table import Table, shown

Source = str | Path | DataSet

LONGEST_NAME = 255  # bytes of a file's name, on most file systems


def read_tables(
    source: Any, *, revision: str | None = None, token: str | None = None, wanted: tuple[str, ...] = ()
) -> Iterator[Table]:
    """One table for each file, data set or list of texts; each is opened when its turn comes. A tuple is one of sources.

    `revision` is of the Hub data sets that name none.
    """
    if isinstance(source, Path):
        yield _path_table(source, wanted)
    elif isinstance(source, str):
        if re.match(r"[A-Za-z][\w+.-]*://", source):
            raise DataError(
                f"{source} is an address, and texts come from files and from data sets on the Hub. Download it and give "
                "the file, or name the data set: org/name:config:split."
            )
        if set("*?[") & set(source) and not Path(source).is_file():
            paths = [Path(path) for path in sorted(glob(source, recursive=True))]
            if not (files := [path for path in paths if path.is_file()]):
                raise DataError(f"No file matches {source}.")
            for path in files:
                yield file_table(path, wanted)
        elif _is_hub_data(source):
            yield hub_table(source, revision, token, wanted)
        else:
            yield _path_table(Path(source).expanduser(), wanted)
    elif isinstance(source, DataSet):
        yield dataset_table(source, type(source).__name__, wanted)
    elif not isinstance(source, Sequence):
        raise DataError(
            f"Texts come from a path, a name, a list or a Dataset, not from {type(source).__name__}.{_way_out(source)}"
        )
    elif isinstance(source, tuple) or _are_sources(source):
        for item in source:
            if isinstance(item, Source):
                yield from read_tables(item, revision=revision, token=token, wanted=wanted)
            else:
                yield _listed_texts(item)
    else:
        yield _listed_texts(source)


def _path_table(path: Path, wanted: tuple[str, ...]) -> Table:
    """Of a file, or of a folder that `datasets` wrote."""
    if len(os.fsencode(path.name)) > LONGEST_NAME:
        raise DataError(f"{str(path)[:60]!r}... is no name of a file. Texts themselves are given as a list.")
    if is_saved(path):
        return saved_table(path, wanted)
    if splits := sorted(item for item in path.iterdir() if is_saved(item)) if path.is_dir() else []:
        raise DataError(f"{path} holds the splits of a data set; name one: {', '.join(map(str, splits))}")
    return file_table(path, wanted)


def _way_out(source: Any) -> str:
    if hasattr(source, "keys"):
        return ' Name one of its parts: data["train"] of a DatasetDict, list(table["text"]) of a table.'
    if hasattr(source, "column_names"):  # a stream of rows
        return ' Take its column: [row["text"] for row in data].'
    return " Make a list of it: list(...)." if hasattr(source, "__iter__") else ""


def _listed_texts(texts: Sequence[Any]) -> Table:
    rows = ((number, {"text": text}) for number, text in enumerate(texts, 1))
    return Table(name="list of texts", unit="item", columns=["text"], rows=rows, unnamed=True)


def read_table(
    source: Source, *, revision: str | None = None, token: str | None = None, wanted: tuple[str, ...] = ()
) -> Table:
    """`read_tables` of what is one table; DataError if it is several."""
    tables = list(islice(read_tables(source, revision=revision, token=token, wanted=wanted), 2))
    if len(tables) != 1:
        raise DataError(f"One file is expected, {source} matches several.")
    return tables[0]


def without_revision(source: str) -> str:
    """A Hub data set's name whatever its revision; any other source as it is."""
    return re.sub(r"@[^:]*", "", source) if _is_hub_data(source) else source


def _is_hub_data(source: str) -> bool:
    return bool(HUB_DATA.fullmatch(source)) and not is_data_name(source) and not Path(source).exists()


def _are_sources(items: Sequence[Any]) -> bool:
    """Whether a list holds sources rather than texts; a list that could be both by mistake is refused."""
    # "and/or" is a text: in a list, a Hub data set is written with its split, "org/name::train".
    likely = [
        (is_data_name(item) or _is_saved_name(item) or bool(HUB_DATA.fullmatch(item) and item.count(":") == 2))
        if isinstance(item, str)
        else isinstance(item, Path | list | tuple | DataSet)
        for item in items
    ]
    if all(likely):
        return bool(items)
    for index, item in enumerate(items):
        if likely[index] and (not isinstance(item, str) or (is_data_name(item) and Path(item).is_file())):
            other = items[likely.index(False)]
            raise DataError(
                f"A list holds either texts or sources, this one holds both: {str(item)!r} and {shown(other)} "
                f"(item {likely.index(False) + 1}). Known file endings: {', '.join(SUFFIXES)}, each also with .gz."
            )
    if items and all(_could_be_a_name(item) and os.path.exists(item) for item in items):
        name, folder = items[0], Path(items[0]).is_dir()
        kind = "folder; its files are" if folder else "file, whose ending is none of"
        known = f"{name}/*.parquet" if folder else ", ".join(SUFFIXES)
        raise DataError(
            f"A list holds texts or sources, and {name!r} is the name of a {kind} {known}. If it is a text: "
            'Dataset.from_dict({"text": [...]}).'
        )
    return False


def _is_saved_name(text: str) -> bool:
    return _could_be_a_name(text) and is_saved(Path(text))


def _could_be_a_name(text: Any) -> bool:
    """One word, no mere dot, and not longer than a name can be."""
    return (
        isinstance(text, str) and len(text) <= LONGEST_NAME and len(text.split()) == 1 and bool(re.search(r"\w", text))
    )
