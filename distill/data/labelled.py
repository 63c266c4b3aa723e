"""Texts with the name of their class, and those to test on."""

import re
from dataclasses import dataclass

from distill.errors import DataError
from distill.tables.sources import Source, read_table
from distill.tables.table import Place, find_column, meant, with_left_out


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """Texts and the number of their class; `names[label]` is its name. `empty` rows were left out.

    `source` is where they come from, a Hub data set with its commit; it names the count of empty rows, too.
    """

    texts: list[str]
    labels: list[int]
    names: list[str]
    test: "Labelled | None" = None
    empty: int = 0
    source: str = ""

    def __len__(self) -> int:
        return len(self.texts)

    def sources(self) -> str:
        """Where these texts and those to test on come from, as far as it is known."""
        return ", ".join(part.source for part in (self, self.test) if part and part.source)


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
        source = with_left_out(places[0].table.name, {"empty": test_empty})
        held_out = Labelled(texts=test_texts, labels=test_labels, names=names, empty=test_empty, source=source)
    labels, source = [number[name] for name in found], with_left_out(origins[0].table.name, {"empty": empty})
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
