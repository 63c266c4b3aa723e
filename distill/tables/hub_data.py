"""Tables from data sets on the Hub, in memory or in a folder, by `datasets`."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from distill.errors import DataError, ResourceError
from distill.hub import COMMIT, dataset_commit
from distill.tables.table import Row, Table, sampled, with_names

# NAME or NAME@REVISION, then :CONFIG:SPLIT; without an ORG/ in front, both colons are there.
HUB_DATA = re.compile(
    r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?(:[\w.-]*){0,2}|[A-Za-z0-9][\w.-]*(@[\w./-]+)?(:[\w.-]*){2}"
)


@runtime_checkable
class DataSet(Protocol):
    """What is used of a `datasets.Dataset`, so that the package is imported for what needs it alone."""

    @property
    def column_names(self) -> list[str]: ...
    @property
    def features(self) -> Any: ...
    def select_columns(self, column_names: Any) -> Any: ...
    def with_format(self, type: Any) -> Any: ...
    def __len__(self) -> int: ...


def hub_table(name: str, revision: str | None, token: str | None, wanted: tuple[str, ...]) -> Table:
    """A split of a Hub data set, "org/name@REVISION:config:split"; `main`, the default and `train` if none is named.

    The table's name has the commit that was read in place of the revision, where it is known.
    """
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
    return dataset_table(data, title, wanted, commit)


def is_saved(folder: Path) -> bool:
    """Whether `Dataset.save_to_disk` wrote it."""
    return (folder / "dataset_info.json").is_file() and (folder / "state.json").is_file()


def saved_table(folder: Path, wanted: tuple[str, ...]) -> Table:
    """Of a folder that `Dataset.save_to_disk` wrote."""
    from datasets import load_from_disk

    try:
        data = load_from_disk(str(folder))
    except Exception as error:  # damaged JSON and Arrow files raise what their readers do
        raise DataError(f"{folder} cannot be read as a data set ({type(error).__name__}: {error}).") from error
    return dataset_table(data, str(folder), wanted)


def dataset_table(given: DataSet, title: str, wanted: tuple[str, ...], commit: str | None = None) -> Table:
    from datasets import ClassLabel

    data, columns = given.with_format(None), list(given.column_names)
    strings = [name for name in columns if "string" in str(getattr(data.features[name], "dtype", ""))]
    read = with_names(columns, wanted) or with_names(columns, ["text", *strings]) or columns[:1]
    data = data.select_columns(read)  # pictures stay undecoded
    classes = {key: value for key, value in data.features.items() if isinstance(value, ClassLabel)}

    def rows() -> Iterator[Row]:
        for number, row in enumerate(data, 1):
            for key, kind in classes.items():
                if isinstance(row[key], int) and row[key] >= 0:
                    row[key] = kind.int2str(row[key])
            yield number, row

    return sampled(Table(name=title, unit="row", columns=columns, rows=rows(), commit=commit))


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
