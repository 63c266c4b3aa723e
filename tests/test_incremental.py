"""Accuracy over tasks against values worked out by hand; and what the recipe encodes for it."""

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch

from distill.classes import in_tasks
from distill.data import Labelled
from distill.encoder import Encoder
from distill.metrics import average_incremental_accuracy, forgetting, seen_accuracy

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
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


@pytest.mark.parametrize(("memory", "passes"), [(0, 5), (1, 7)])
def test_without_a_memory_no_text_is_encoded_to_be_chosen(
    tiny_bert: Path, monkeypatch: pytest.MonkeyPatch, memory: int, passes: int
) -> None:
    """Of two tasks: each before it is learned, the tests of one and of two, and, to choose what is kept, each once more."""
    spec = importlib.util.spec_from_file_location("incremental", RECIPES / "incremental.py")
    assert spec is not None
    assert spec.loader is not None
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    encode: Callable[..., torch.Tensor] = recipe.encode_everywhere
    seen: list[int] = []

    def counted(encoder: Encoder, texts: list[str]) -> torch.Tensor:
        seen.append(len(texts))
        return encode(encoder, texts)

    monkeypatch.setattr(recipe, "encode_everywhere", counted)
    test = Labelled(texts=tiny.SENTENCES[8:12], labels=[0, 1, 2, 3], names=["a", "b", "c", "d"])
    data = Labelled(texts=tiny.SENTENCES[:8], labels=[0, 1, 2, 3] * 2, names=["a", "b", "c", "d"], test=test)
    flags = recipe.Recipe(train_data="x", encoder="x", memory=memory, ways=("frozen encoder",))
    encoder = Encoder.from_pretrained(tiny_bert)
    recipe.learn(flags, "frozen encoder", 0, encoder, in_tasks(data, 2, seed=0))
    assert len(seen) == passes
