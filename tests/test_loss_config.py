"""The loss of a recipe: which terms there are, when they fade, at which widths they count."""

from typing import Any

import pytest
import torch

from distill import losses
from distill.config import LossConfig
from distill.errors import RecipeError
from distill.losses import Matryoshka, WeightedSum

ALL = {"gram_mse": 2.0, "gram_kl": 0.5, "rkd_distance": 3.0}


def test_without_flags_it_is_the_sum_of_two_terms_that_stay() -> None:
    total = LossConfig().build(8)
    assert isinstance(total, WeightedSum)
    assert [*total.terms] == ["cosine", "contrastive"]
    assert total.weights() == {"cosine": 1.0, "contrastive": 0.3}
    total.set_progress(1.0)
    assert total.weights() == {"cosine": 1.0, "contrastive": 0.3}


def test_each_term_is_its_loss_and_a_weight_of_zero_leaves_it_out() -> None:
    student, teacher, bank = torch.randn(6, 8), torch.randn(6, 8), torch.randn(9, 8)
    total = LossConfig(temperature=0.2, **ALL).build(8)
    value = total(student, teacher, bank)
    expected = losses.cosine_distance(student, teacher)
    expected += 0.3 * losses.cross_contrastive(student, teacher, bank, temperature=0.2)
    expected += 2 * losses.gram_mse(student, teacher) + 0.5 * losses.gram_kl(student, teacher, temperature=0.2)
    expected += 3 * losses.rkd_distance(student, teacher)
    torch.testing.assert_close(value, expected)
    assert "kl" not in total.terms


def test_terms_fade_when_their_flag_says() -> None:
    total = LossConfig(
        contrastive=1.0, contrastive_until=0.25, kl=1.0, kl_until=1.0, relational_until=0.5, **ALL
    ).build(8)
    seen = {}
    for progress in (0.0, 0.25, 0.5, 1.0):
        total.set_progress(progress)
        seen[progress] = total.weights()
    start = {"cosine": 1.0, "contrastive": 1.0, "kl": 1.0, **ALL}
    assert seen[0.0] == start
    assert seen[0.25] == {
        **{name: weight / 2 for name, weight in start.items()},
        "cosine": 1,
        "contrastive": 0,
        "kl": 0.75,
    }
    assert seen[0.5] == {**dict.fromkeys(start, 0.0), "cosine": 1, "kl": 0.5}
    assert seen[1.0] == {**dict.fromkeys(start, 0.0), "cosine": 1}


def test_widths_are_the_sum_at_each_width_and_the_whole_vector_always_counts() -> None:
    student, teacher, bank = torch.randn(6, 8), torch.randn(6, 8), torch.randn(9, 8)
    for widths in ((2, 4), (2, 4, 8)):
        config = LossConfig(widths=widths, gram_mse=1.0)
        nested = config.build(8)
        assert isinstance(nested, Matryoshka)
        assert nested.widths == (2, 4, 8)
        assert nested.uses_bank
        whole = LossConfig(gram_mse=1.0).build(8)
        expected = sum(whole(student[:, :w], teacher[:, :w], bank[:, :w]) for w in (2, 4, 8))
        torch.testing.assert_close(nested(student, teacher, bank), expected)
    nested.set_progress(0.5)
    assert nested.loss.weights()["gram_mse"] == 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"gram_kl": -1.0}, "weights are 0 or more.*gram_kl -1.0"),
        ({"cosine": float("nan")}, "weights are 0 or more"),
        ({"cosine": 0.0, "contrastive_until": 0.5}, "cosine or contrastive above 0 to the end"),
        ({"cosine": 0.0, "contrastive": 0.0, "gram_mse": 1.0}, "cosine or contrastive above 0 to the end"),
        ({"contrastive_until": 0.0}, "contrastive_until is above 0, up to 1, got 0.0"),
        ({"kl_until": 1.1}, "kl_until is above 0, up to 1, got 1.1"),
        ({"relational_until": -0.5}, "relational_until is above 0"),
        ({"temperature": 0.0}, "temperature is above 0 or auto, got 0.0"),
        ({"perplexity": 1.0}, "perplexity above 1, got 1.0"),
        ({"widths": (8, 4)}, "widths rise from 1, each once, got 8 4"),
        ({"widths": (0, 4)}, "widths rise from 1"),
        ({"widths": (4, 4)}, "widths rise from 1"),
    ],
    ids=str,
)
def test_a_loss_that_cannot_train_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        LossConfig(**wrong)


def test_widths_beyond_the_teachers_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"--loss.widths go up to the teacher's 8, got 16"):
        LossConfig(widths=(4, 16)).build(8)
