"""Labelled texts in parts: every text once, in the place where it belongs."""

from collections import Counter

import pytest

from distill.classes import hold_out_of_each, in_tasks, shots
from distill.data import Labelled
from distill.errors import DataError


def sample(sizes: list[int], test_sizes: list[int] | None = None) -> Labelled:
    names = [f"class {label}" for label in range(len(sizes))]
    rows = [(f"{names[label]}, text {number}", label) for label, size in enumerate(sizes) for number in range(size)]
    test = None if test_sizes is None else sample(test_sizes)
    return Labelled(texts=[text for text, _ in rows], labels=[label for _, label in rows], names=names, test=test)


def test_shots_are_so_many_of_each_class_and_differ_by_seed() -> None:
    data = sample([5, 3, 9])
    chosen = shots(data, 3, seed=1)
    assert Counter(data.labels[row] for row in chosen) == {0: 3, 1: 3, 2: 3}
    assert len(set(chosen)) == 9
    assert chosen == shots(data, 3, seed=1) != shots(data, 3, seed=2)
    assert sorted(shots(data, None)) == list(range(17))


def test_a_share_of_each_class_is_held_out() -> None:
    data = sample([10, 2, 31])
    parts = hold_out_of_each(data, 0.2, seed=3)
    assert Counter(parts.test.labels) == {0: 2, 1: 1, 2: 6}
    assert sorted([*parts.texts, *parts.test.texts]) == sorted(data.texts)
    for part in (parts, parts.test):
        assert all(text.startswith(part.names[label]) for text, label in zip(part.texts, part.labels, strict=True))
    with pytest.raises(DataError, match="class 1: one text of a class"):
        hold_out_of_each(sample([4, 1]))


def test_classes_come_in_tasks_numbered_as_they_come() -> None:
    data = sample([3, 4, 5, 6, 7, 8, 9], [1, 2, 1, 2, 1, 2, 1])
    tasks = in_tasks(data, 3, seed=5)
    assert [len(task.names) for task in tasks] == [2, 2, 3]
    assert [sorted(set(task.labels)) for task in tasks] == [[0, 1], [2, 3], [4, 5, 6]]
    assert sorted(name for task in tasks for name in task.names) == data.names
    for whole, parts in ((data, tasks), (data.test, [task.test for task in tasks])):
        assert sorted(text for part in parts for text in part.texts) == sorted(whole.texts)
    for task in tasks:
        for part in (task, task.test):
            first = min(task.labels)
            assert all(
                text.startswith(task.names[label - first]) for text, label in zip(part.texts, part.labels, strict=True)
            )
    assert [task.names for task in tasks] != [task.names for task in in_tasks(data, 3, seed=6)]
    assert in_tasks(sample([2, 2]), 1)[0].test is None
    with pytest.raises(DataError, match="7 classes come in 1 to 7 tasks, got 8"):
        in_tasks(data, 8)


def test_a_task_without_a_test_text_is_told_by_its_classes() -> None:
    data = sample([3, 3, 3, 3], [1, 0, 1, 1])
    with pytest.raises(DataError, match=r"a task of the classes class 1 has no test text \(seed 2\)"):
        in_tasks(data, 4, seed=2)
    assert len(in_tasks(data, 1)[0].test) == 3
