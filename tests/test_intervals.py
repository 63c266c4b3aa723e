"""Paired differences: p-values that are what they say under no difference, and small under one."""

import itertools
import math

import pytest
import torch

from distill.metrics import (
    Interval,
    bootstrap_interval,
    bootstrap_means,
    paired_difference,
    resampled_difference,
    spearman,
    spearman_counted,
)


def test_the_p_value_of_three_rows_is_that_of_all_sign_patterns() -> None:
    found = paired_difference(torch.tensor([1.0, 2.0, 3.0]), torch.zeros(3))
    assert found.p_value == pytest.approx(2 / 8, abs=0.02)
    assert found.interval.value == 2
    mixed = paired_difference(torch.tensor([1.0, 2.0, -3.0]), torch.zeros(3))
    assert mixed.p_value == 1


def test_signs_of_eight_rows_at_a_time_are_those_of_all_patterns() -> None:
    """Of 11 rows, so that the last eight are not whole: against the 2048 ways to sign them."""
    first, second = torch.randn(11) + 0.4, torch.randn(11)
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=11)), dtype=torch.float64)
    differences = first.double() - second.double()
    exact = float(((signs @ differences).abs() >= differences.sum().abs() - 1e-9).double().mean())
    assert 0.02 < exact < 0.9
    found = paired_difference(first, second, flips=20_000).p_value
    assert found == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 20_000))


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


@pytest.mark.parametrize("levels", [4, 1000])
def test_counted_rows_rank_as_drawn_ones(levels: int) -> None:
    a = torch.randint(levels, (40,)).double()
    b = a + torch.randint(levels, (40,))
    draw = torch.randint(40, (30, 40))
    counts = torch.stack([row.bincount(minlength=40) for row in draw]).double()
    torch.testing.assert_close(spearman_counted(counts, a, b), spearman(a[draw], b[draw]), rtol=0, atol=1e-12)
    a[7] = torch.nan
    found, expected = spearman_counted(counts, a, b), spearman(a[draw], b[draw])
    assert 0 < expected.isnan().sum() < 30
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12, equal_nan=True)
    assert spearman_counted(counts, torch.ones(40), b).isnan().all()


def test_intervals_are_the_same_counted_and_drawn() -> None:
    a, b = torch.randn(60), torch.randn(60)
    drawn = bootstrap_interval(a, b, statistic=spearman)
    counted = bootstrap_interval(a, b, statistic=spearman, counted=spearman_counted)
    assert vars(counted) == pytest.approx(vars(drawn), abs=1e-12)
    assert drawn.low < drawn.value < drawn.high
    c = b.clone()
    c[3] = torch.nan
    for found, one in zip(bootstrap_means(a, b, c), (a, b, c), strict=True):
        assert vars(found) == pytest.approx(vars(bootstrap_interval(one)), abs=1e-12, nan_ok=True)
    assert bootstrap_interval(c).low < 0, "resamples without the row that is not a number"


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


def test_a_difference_is_drawn_by_its_seed() -> None:
    first, second = torch.randn(2, 40)
    one, again, other = (paired_difference(first, second, seed=seed) for seed in (0, 0, 1))
    assert one == again
    assert one.interval.value == other.interval.value
    assert one.interval.low != other.interval.low
    assert one.p_value != other.p_value


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
