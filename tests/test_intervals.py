"""Paired differences: p-values that are what they say under no difference, and small under one."""

import math

import pytest
import torch

from distill.metrics import Interval, paired_difference, resampled_difference, spearman


def test_the_p_value_of_three_rows_is_that_of_all_sign_patterns() -> None:
    found = paired_difference(torch.tensor([1.0, 2.0, 3.0]), torch.zeros(3))
    assert found.p_value == pytest.approx(2 / 8, abs=0.02)
    assert found.interval.value == 2
    mixed = paired_difference(torch.tensor([1.0, 2.0, -3.0]), torch.zeros(3))
    assert mixed.p_value == 1


def test_systems_that_are_alike_have_a_uniform_p_value() -> None:
    found = torch.tensor(
        [paired_difference(torch.randn(25), torch.randn(25), flips=399, samples=10, seed=s).p_value for s in range(500)]
    )
    for level in (0.05, 0.2, 0.5, 0.8):
        spread = 4 * math.sqrt(level * (1 - level) / 500)
        assert float((found <= level).double().mean()) == pytest.approx(level, abs=spread)


def test_a_real_difference_has_a_small_p_value_and_a_sign() -> None:
    hard = torch.randn(100)  # what both share: paired, it does not hide the difference
    better, worse = 5 * hard + 0.5 + torch.randn(100), 5 * hard + torch.randn(100)
    found = paired_difference(better, worse)
    assert found.p_value < 0.01
    assert found.interval.low > 0
    opposite = paired_difference(worse, better)
    assert opposite.p_value == found.p_value
    assert opposite.interval.value == -found.interval.value
    unpaired = paired_difference(better, worse[torch.randperm(100)])
    assert unpaired.p_value > 0.1


def test_the_same_values_differ_by_nothing() -> None:
    values = torch.rand(50)
    found = paired_difference(values, values)
    assert (found.p_value, found.interval) == (1.0, Interval(value=0.0, low=0.0, high=0.0))
    assert str(found) == "+0.000 [+0.000, +0.000], p = 1.0000"


def rank_difference(a: torch.Tensor, b: torch.Tensor, gold: torch.Tensor) -> torch.Tensor:
    return spearman(a, gold) - spearman(b, gold)


def test_rank_correlations_that_are_alike_seldom_have_a_small_p_value() -> None:
    small = 0
    for seed in range(200):
        gold = torch.randn(80)
        a, b = gold + torch.randn(80), 9 * (gold + torch.randn(80))  # one correlation, two scales
        small += resampled_difference(a, b, gold, statistic=rank_difference, samples=200, seed=seed).p_value <= 0.05
    assert small / 200 < 0.12


def test_a_better_rank_correlation_has_a_small_p_value_where_its_interval_leaves_zero_out() -> None:
    gold = torch.randn(200)
    found = resampled_difference(
        gold + 0.5 * torch.randn(200), gold + 2 * torch.randn(200), gold, statistic=rank_difference
    )
    assert found.p_value < 0.01
    assert 0 < found.interval.low < found.interval.value < found.interval.high
    same = resampled_difference(gold, gold, gold, statistic=rank_difference)
    assert same.p_value == 1


def test_an_undefined_difference_has_no_p_value() -> None:
    assert math.isnan(paired_difference(torch.tensor([math.nan, 1.0]), torch.zeros(2)).p_value)
    constant = torch.ones(20)
    assert math.isnan(resampled_difference(constant, constant, torch.randn(20), statistic=rank_difference).p_value)


@pytest.mark.usefixtures("unchecked")
def test_rows_that_do_not_pair_are_refused() -> None:
    with pytest.raises(ValueError, match=r"paired_difference needs arrays of one length, got \[\(3,\), \(2,\)\]"):
        paired_difference(torch.ones(3), torch.ones(2))
    with pytest.raises(ValueError, match="resampled_difference needs arrays of one length"):
        resampled_difference(torch.ones(3), torch.ones(2), statistic=spearman)
