"""Sums of losses against their terms."""

import pytest
import torch

from distill import losses
from distill.losses import WeightedSum, constant, cross_kl, linear_decay


def terms() -> dict[str, torch.nn.Module]:
    return {"near": losses.CosineDistance(), "far": losses.CrossKL(temperature=0.1)}


def test_a_weighted_sum_is_its_terms_and_bank_reaches_only_cross_terms() -> None:
    student, teacher, bank = (torch.randn(5, 8) for _ in range(3))
    keys, bank_keys = torch.arange(5), torch.arange(3, 8)
    total = WeightedSum(terms(), {"near": 2.0, "far": 0.5})
    value = total(student, teacher, bank, keys=keys, bank_keys=bank_keys)
    far = cross_kl(student, teacher, bank, keys=keys, bank_keys=bank_keys, temperature=0.1)
    torch.testing.assert_close(value, 2 * losses.cosine_distance(student, teacher) + 0.5 * far)
    torch.testing.assert_close(total.parts()["far"], far)
    assert total.uses_bank
    assert not WeightedSum({"near": losses.CosineDistance()}).uses_bank
    assert "near=2" in repr(total)


def test_parts_hold_no_graph() -> None:
    total = WeightedSum(terms())
    total(torch.randn(5, 8, requires_grad=True), torch.randn(5, 8)).backward()
    assert all(not part.requires_grad for part in total.parts().values())


def test_a_schedule_follows_progress_and_a_weight_of_zero_is_not_computed() -> None:
    total = WeightedSum(terms(), {"near": linear_decay(1.0, until=0.5), "far": constant(1.0)})
    seen = {}
    for progress in (0.0, 0.25, 0.5, 1.0):
        total.set_progress(progress)
        seen[progress] = total.weights()["near"]
        total(torch.randn(5, 8), torch.randn(5, 8))
        assert set(total.parts()) == ({"near", "far"} if seen[progress] else {"far"})
    assert seen == {0.0: 1.0, 0.25: 0.5, 0.5: 0.0, 1.0: 0.0}


def test_sums_nest_and_share_progress() -> None:
    inner = WeightedSum(terms(), {"near": linear_decay(1.0), "far": 1.0})
    outer = WeightedSum({"inner": inner})
    outer.set_progress(0.5)
    assert (outer.progress, inner.progress) == (0.5, 0.5)
    assert outer.uses_bank


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"near": 1.0}, "weight for every term"),
        ({"near": 1.0, "far": 1.0, "further": 1.0}, "weight for every term"),
        ({"near": 0.0, "far": 0.0}, "at 0.00"),
        ({"near": linear_decay(1.0, until=0.5), "far": 0.0}, "at 0.50"),
        ({"near": float("nan"), "far": 1.0}, "finite"),
    ],
)
def test_weights_that_cannot_train_are_refused_before_the_run(weights: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WeightedSum(terms(), weights)


def test_progress_is_a_fraction() -> None:
    with pytest.raises(ValueError, match="from 0 to 1, got 3"):
        WeightedSum(terms()).set_progress(3.0)
    with pytest.raises(ValueError, match="until=0"):
        linear_decay(1.0, until=0.0)
