"""Labelled texts in parts: some of each class, a share held out, or classes that come task after task."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import torch

from distill.data import Labelled
from distill.errors import DataError


def shots(data: Labelled, count: int | None, *, seed: int = 0) -> list[int]:
    """Numbers of `count` texts of each class, drawn by seed; of all, in the order drawn, without a count."""
    seen: Counter[int] = Counter()
    chosen = []
    for number in _drawn(len(data), seed):
        seen[data.labels[number]] += 1
        if count is None or seen[data.labels[number]] <= count:
            chosen.append(number)
    return chosen


def hold_out_of_each(data: Labelled, fraction: float = 0.2, *, seed: int = 0) -> Labelled:
    """The same texts, this share of each class as their `test`: what settings are chosen by, so that test texts are not.

    At least one text of each class stays to train on, and one is held out; DataError for a class of one text.
    """
    sizes, taken = Counter(data.labels), Counter[int]()
    alone = [data.names[label] for label, size in sizes.items() if size < 2]
    if alone:
        raise DataError(
            f"{', '.join(sorted(alone)[:5])}: one text of a class cannot be trained on and held out as well."
        )
    wanted = {label: min(size - 1, max(1, round(fraction * size))) for label, size in sizes.items()}
    held = []
    for number in _drawn(len(data), seed):
        label = data.labels[number]
        if taken[label] < wanted[label]:
            taken[label] += 1
            held.append(number)
    rest = sorted(set(range(len(data))) - set(held))
    return replace(_rows(data, rest), test=_rows(data, sorted(held)))


def in_tasks(data: Labelled, tasks: int, *, seed: int = 0) -> list[Labelled]:
    """The classes in so many tasks, as equal as can be, in an order drawn by seed; each with its own texts of `data.test`.

    Labels are numbered as they come: the first task has 0, 1, ..., the next goes on, so that a label stays the column of a
    head that grows. `names` are those of the task alone, its lowest label first. DataError for a task without a test text.
    """
    classes = len(data.names)
    if not 1 <= tasks <= classes:
        raise DataError(f"{classes} classes come in 1 to {classes} tasks, got {tasks}.")
    order = _drawn(classes, seed)
    place = {label: number for number, label in enumerate(order)}
    bounds = [number * classes // tasks for number in range(tasks + 1)]
    parts = [_task(data, range(first, last), place, order) for first, last in pairwise(bounds)]
    for part in parts:
        if part.test is not None and not len(part.test):
            raise DataError(
                f"a task of the classes {', '.join(part.names[:5])} has no test text (seed {seed}). Give test texts of each "
                "class, leave out those classes, or take fewer tasks."
            )
    return parts


def _task(data: Labelled, labels: range, place: dict[int, int], order: list[int]) -> Labelled:
    names = [data.names[order[label]] for label in labels]
    parts = []
    for whole in (data, data.test):
        if whole is not None:
            rows = [number for number, label in enumerate(whole.labels) if place[label] in labels]
            part = _rows(whole, rows)
            parts.append(replace(part, labels=[place[label] for label in part.labels], names=names))
    return replace(parts[0], test=parts[1] if len(parts) > 1 else None)


def _rows(data: Labelled, rows: list[int]) -> Labelled:
    return Labelled(
        texts=[data.texts[row] for row in rows], labels=[data.labels[row] for row in rows], names=data.names
    )


def _drawn(count: int, seed: int) -> list[int]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
