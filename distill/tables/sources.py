"""Which table a source is: a file, a glob, a data set on the Hub, a list of texts, or several of these."""

import re
from collections.abc import Iterator, Sequence
from glob import glob
from itertools import islice
from pathlib import Path
from typing import Any

from distill.errors import DataError
from distill.tables.files import SUFFIXES, file_table, is_data_name
from distill.tables.hub_data import HUB_DATA, hub_table
from distill.tables.table import Table, shown

Source = str | Path


def read_tables(
    source: Any, *, revision: str | None = None, token: str | None = None, wanted: tuple[str, ...] = ()
) -> Iterator[Table]:
    """One table for each file, data set or list of texts; each is opened when its turn comes. A tuple is one of sources.

    `revision` is of the Hub data sets that name none.
    """
    if isinstance(source, Path):
        yield file_table(source, wanted)
    elif isinstance(source, str):
        if set("*?[") & set(source) and not Path(source).is_file():
            paths = [Path(path) for path in sorted(glob(source, recursive=True))]
            if not (files := [path for path in paths if path.is_file()]):
                raise DataError(f"No file matches {source}.")
            for path in files:
                yield file_table(path, wanted)
        elif _is_hub_data(source):
            yield hub_table(source, revision, token, wanted)
        else:
            yield file_table(Path(source).expanduser(), wanted)
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
        (is_data_name(item) or bool(HUB_DATA.fullmatch(item) and item.count(":") == 2))
        if isinstance(item, str)
        else isinstance(item, Path | list | tuple)
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
    return False
