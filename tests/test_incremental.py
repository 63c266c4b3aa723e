"""Accuracy over tasks against values worked out by hand."""

import math

import pytest
import torch

from distill.metrics import average_incremental_accuracy, forgetting, seen_accuracy

NAN = math.nan
# After task 1: .9. After 2: .6 and .8. After 3: .3, .9 and .7.
MATRIX = torch.tensor([[0.9, NAN, NAN], [0.6, 0.8, NAN], [0.3, 0.9, 0.7]])


def test_what_is_known_after_each_task() -> None:
    torch.testing.assert_close(seen_accuracy(MATRIX), torch.tensor([0.9, 0.7, 1.9 / 3], dtype=torch.float64))
    assert average_incremental_accuracy(MATRIX) == pytest.approx((0.9 + 0.7 + 1.9 / 3) / 3)


def test_tasks_of_other_sizes_weigh_as_many_texts_as_they_have() -> None:
    seen = seen_accuracy(MATRIX, torch.tensor([30, 10, 60]))
    by_hand = [0.9, (30 * 0.6 + 10 * 0.8) / 40, (30 * 0.3 + 10 * 0.9 + 60 * 0.7) / 100]
    torch.testing.assert_close(seen, torch.tensor(by_hand, dtype=torch.float64))
    assert average_incremental_accuracy(MATRIX, torch.tensor([30, 10, 60])) == pytest.approx(sum(by_hand) / 3)


def test_what_was_forgotten_is_counted_from_the_best_there_was() -> None:
    # Task 1 fell from .9 to .3; task 2 rose from .8 to .9, which is no loss; the last cannot have been forgotten.
    assert forgetting(MATRIX) == pytest.approx((0.6 - 0.1) / 2)
    risen_then_fallen = torch.tensor([[0.5, NAN, NAN], [0.8, 0.6, NAN], [0.7, 0.6, 0.9]])
    assert forgetting(risen_then_fallen) == pytest.approx((0.1 + 0.0) / 2)


def test_what_is_to_come_is_not_read() -> None:
    filled = MATRIX.nan_to_num(nan=1.0)
    assert torch.equal(seen_accuracy(filled), seen_accuracy(MATRIX))
    assert forgetting(filled) == forgetting(MATRIX)


def test_what_is_no_such_matrix_is_named() -> None:
    with pytest.raises(ValueError, match=r"forgetting needs a number .* got NaN"):
        forgetting(torch.tensor([[0.9, NAN], [NAN, 0.8]]))
    with pytest.raises(ValueError, match="got one task"):
        forgetting(torch.ones(1, 1))
    with pytest.raises(ValueError, match=r"each of 3 tasks, above 0, got \[30\.0, 0\.0, 60\.0\]"):
        seen_accuracy(MATRIX, torch.tensor([30, 0, 60]))


@pytest.mark.usefixtures("unchecked")
def test_wrong_shapes_are_named() -> None:
    with pytest.raises(ValueError, match=r"square matrix, .* got \(2, 3\)"):
        seen_accuracy(torch.ones(2, 3))
    with pytest.raises(ValueError, match="each of 3 tasks"):
        seen_accuracy(MATRIX, torch.tensor([30, 60]))
