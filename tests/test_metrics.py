"""Metrics against scipy, hand-counted examples and slow loops."""

import math
import time

import pytest
import scipy.stats
import torch

from distill.heads import CosineLinear
from distill.metrics import (
    accuracy,
    accuracy_counts,
    bootstrap_interval,
    effective_rank,
    ndcg_at_k,
    neighbour_overlap,
    recall_at_k,
    spearman,
)


def test_accuracy_is_correct_over_total() -> None:
    logits = torch.tensor([[3.0, 2, 1], [1, 2, 3], [2, 3, 1], [1, 3, 2]])
    assert accuracy(logits, torch.tensor([0, 0, 0, 0]), topk=(1, 2, 3)) == {1: 0.25, 2: 0.5, 3: 1.0}
    assert accuracy(logits, torch.tensor([0, 2, 1, 1])) == {1: 1.0}


def test_uneven_batches_add_up_exactly_where_a_mean_of_means_does_not() -> None:
    logits, targets = torch.randn(101, 7), torch.randint(7, (101,))
    batches = [accuracy_counts(*batch, topk=(1, 3)) for batch in zip(logits.split(50), targets.split(50), strict=True)]
    whole = accuracy(logits, targets, topk=(1, 3))
    assert (batches[0] + batches[1] + batches[2]).fractions() == whole
    assert sum(batch.fractions()[1] for batch in batches) / 3 != whole[1]
    with pytest.raises(ValueError, match="same k"):
        batches[0] + accuracy_counts(logits, targets)


def test_constants_and_nan_score_nothing() -> None:
    targets = torch.tensor([0, 1, 2, 3])
    assert accuracy(torch.zeros(4, 4), targets, topk=(1, 2)) == {1: 0.25, 2: 0.5}
    assert accuracy(torch.full((4, 4), torch.nan), targets, topk=(1, 4)) == {1: 0.0, 4: 0.0}


def test_accuracy_refuses_unreduced_proxies() -> None:
    x, targets = torch.randn(6, 8), torch.randint(5, (6,))
    reduced = CosineLinear(8, 5, 4, to_reduce=True)(x)
    assert accuracy(reduced, targets, num_classes=5) == accuracy(reduced["logits"], targets)
    output = CosineLinear(8, 5, 4)(x)
    with pytest.raises(ValueError, match=r"accuracy .*\(6, 20\) with 4 proxies"):
        accuracy(output, targets)
    with pytest.raises(ValueError, match=r"5 classes, got logits \(6, 20\)"):
        accuracy(output["logits"], targets, num_classes=5)


@pytest.mark.usefixtures("unchecked")
def test_accuracy_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"\(6, 5\) and \(3,\)"):
        accuracy(torch.randn(6, 5), torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="at least one row"):
        accuracy(torch.randn(0, 5), torch.zeros(0, dtype=torch.long))
    with pytest.raises(ValueError, match=r"topk=\(6,\)"):
        accuracy(torch.randn(6, 5), torch.zeros(6, dtype=torch.long), topk=(6,))


@pytest.mark.parametrize("levels", [3, 1000])
def test_spearman_equals_scipy_with_and_without_ties(levels: int) -> None:
    a, b = torch.randint(levels, (4, 50)).float(), torch.randint(levels, (4, 50)).float()
    b = b + a
    found = spearman(a, b)
    for row in range(4):
        assert float(found[row]) == pytest.approx(scipy.stats.spearmanr(a[row], b[row]).statistic, abs=1e-12)
        torch.testing.assert_close(spearman(a[row], b[row]), found[row])
    assert float(spearman(a[0], a[0] ** 3)) == pytest.approx(1)


@pytest.mark.usefixtures("unchecked")
def test_spearman_is_nan_where_it_is_undefined() -> None:
    a = torch.arange(5.0)
    assert spearman(a, torch.ones(5)).isnan()
    assert spearman(a, a.where(a > 0, torch.nan)).isnan()
    assert spearman(a[:1], a[:1]).isnan()
    with pytest.raises(ValueError, match=r"\(5,\) and \(1,\)"):
        spearman(a, a[:1])


RANKED = [["a", "b", "c", "d"], ["x", "y"], ["a", "b"], []]
QRELS = [{"b": 3.0, "d": 1.0, "z": 2.0, "a": 0.0}, {}, {"a": 0.0}, {"a": 1.0}]


def test_recall_and_ndcg_by_hand() -> None:
    recall, ndcg = recall_at_k(RANKED, QRELS, 3), ndcg_at_k(RANKED, QRELS, 3)
    assert recall.values.tolist() == pytest.approx([1 / 3, 0])
    best = 3 + 2 / math.log2(3) + 1 / math.log2(4)
    assert ndcg.values.tolist() == pytest.approx([(3 / math.log2(3)) / best, 0])
    assert (recall.skipped, ndcg.skipped) == (2, 2)
    assert ndcg.mean() == pytest.approx(float(ndcg.values[0]) / 2)
    assert recall_at_k(RANKED, QRELS, 4).values[0] == pytest.approx(2 / 3)


def test_ndcg_of_the_ideal_order_is_one_and_indices_may_be_a_tensor() -> None:
    qrels = [{7: 1.0, 3: 2.0, 9: -1.0}]
    assert ndcg_at_k(torch.tensor([[3, 7, 9]]), qrels, 10).mean() == pytest.approx(1)
    assert ndcg_at_k(torch.tensor([[9, 7, 3]]), qrels, 10).mean() < 0.8
    assert ndcg_at_k([torch.tensor([3, 7, 9])], qrels, 10).mean() == pytest.approx(1)  # batch by batch
    assert ndcg_at_k(torch.tensor([[3]]), qrels, 1).mean() == pytest.approx(1)


def test_ranks_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="Query 0 ranks a document twice"):
        ndcg_at_k([["a", "a"]], [{"a": 1.0}], 2)
    with pytest.raises(ValueError, match="got 1, 2"):
        recall_at_k([["a"]], [{"a": 1.0}, {}], 2)


def test_neighbour_overlap_equals_sets() -> None:
    a = torch.randn(40, 8)
    b = a[:, :6] + 0.5 * torch.randn(40, 6)
    expected = []
    for i in range(40):
        near = [
            set(sorted((j for j in range(40) if j != i), key=lambda j: -torch.cosine_similarity(x[i], x[j], dim=0))[:5])
            for x in (a, b)
        ]
        expected.append(len(near[0] & near[1]) / 5)
    torch.testing.assert_close(neighbour_overlap(a, b, k=5), torch.tensor(expected))
    assert (neighbour_overlap(a, 3 * a) == 1).all()
    assert neighbour_overlap(a, torch.randn(40, 8)).mean() < 0.5


def test_effective_rank() -> None:
    assert float(effective_rank(torch.eye(8)[:5])) == pytest.approx(5)
    assert float(effective_rank(torch.ones(10, 4))) == pytest.approx(1, abs=1e-6)
    assert float(effective_rank(torch.zeros(3, 4))) == 0
    assert 7 < float(effective_rank(torch.randn(500, 8))) <= 8
    uneven = torch.diag(torch.tensor([3.0, 1.0]))
    assert float(effective_rank(uneven)) == pytest.approx(math.exp(0.75 * math.log(4 / 3) + 0.25 * math.log(4)))


def test_the_interval_of_a_mean_covers_as_often_as_it_says() -> None:
    found = [bootstrap_interval(torch.randn(50), samples=300, confidence=0.9, seed=s) for s in range(200)]
    covered = sum(interval.low <= 0 <= interval.high for interval in found) / len(found)
    assert 0.82 < covered < 0.96
    values = torch.randn(400)
    interval = bootstrap_interval(values)
    assert interval.value == pytest.approx(float(values.mean()))
    assert interval.high - interval.low == pytest.approx(2 * 1.96 / 20, rel=0.15)
    assert str(interval) == f"{interval.value:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def test_an_interval_is_a_function_of_its_seed_and_touches_no_other() -> None:
    values, before = torch.randn(50), torch.get_rng_state()
    assert bootstrap_interval(values, seed=1) == bootstrap_interval(values, seed=1)
    assert bootstrap_interval(values, seed=1) != bootstrap_interval(values, seed=2)
    assert torch.equal(torch.get_rng_state(), before)


def test_paired_values_are_drawn_together_and_fast() -> None:
    a = torch.randn(1500)
    b = a + 0.5 * torch.randn(1500)
    start = time.process_time()
    interval = bootstrap_interval(a, b, statistic=spearman)
    assert time.process_time() - start < 2
    assert interval.low < interval.value < interval.high
    assert interval.high - interval.low < 0.05
    assert interval.value == pytest.approx(scipy.stats.spearmanr(a, b).statistic)
    shuffled = bootstrap_interval(a, b[torch.randperm(1500)], statistic=spearman)
    assert shuffled.high < interval.low


@pytest.mark.usefixtures("unchecked")
def test_bootstrap_refuses_what_it_cannot_draw() -> None:
    with pytest.raises(ValueError, match=r"\[\(3,\), \(2,\)\]"):
        bootstrap_interval(torch.ones(3), torch.ones(2))
    with pytest.raises(ValueError, match="one length"):
        bootstrap_interval()
    with pytest.raises(ValueError, match=r"confidence=1\.0"):
        bootstrap_interval(torch.ones(3), confidence=1.0)
