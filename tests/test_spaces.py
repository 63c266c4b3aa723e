"""Two spaces over the same rows, against dense formulas, loops, and derivatives by the weight of a row."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from distill.metrics import (
    bootstrap_interval,
    effective_rank,
    effective_rank_rows,
    index_overlap,
    linear_cka,
    linear_cka_rows,
    neighbour_margin,
    neighbour_overlap,
)


def rotation(width: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(width, width))[0]


def unit(rows: torch.Tensor) -> np.ndarray:
    return F.normalize(rows.double(), dim=1).numpy()


# Neighbourhoods across


def test_index_overlap_equals_sets_of_what_is_found_among_the_teachers_rows() -> None:
    teacher = torch.randn(40, 8)
    student = teacher + torch.randn(40, 8)
    expected = []
    for i in range(40):
        found = []
        for query in (student[i], teacher[i]):
            order = sorted(
                (j for j in range(40) if j != i), key=lambda j: -F.cosine_similarity(query, teacher[j], dim=0)
            )
            found.append(set(order[:5]))
        expected.append(len(found[0] & found[1]) / 5)
    torch.testing.assert_close(index_overlap(student, teacher, k=5), torch.tensor(expected))
    assert 0.2 < sum(expected) / 40 < 0.95
    assert (index_overlap(3 * teacher, teacher) == 1).all()


def test_a_rotated_student_keeps_its_neighbourhoods_and_finds_nothing_in_the_index() -> None:
    teacher = torch.randn(200, 16)
    student = teacher @ rotation(16)
    assert neighbour_overlap(student, teacher).mean() > 0.999
    assert index_overlap(student, teacher).mean() < 0.3


@pytest.mark.usefixtures("unchecked")
def test_index_overlap_needs_one_width() -> None:
    with pytest.raises(ValueError, match="index_overlap compares vectors of one width"):
        index_overlap(torch.randn(20, 4), torch.randn(20, 8))


def test_the_margin_is_the_nearest_cosine_less_the_kth() -> None:
    rows = torch.randn(30, 6)
    for i, margin in enumerate(neighbour_margin(rows, k=4).tolist()):
        cosines = sorted(
            (float(F.cosine_similarity(rows[i], rows[j], dim=0)) for j in range(30) if j != i), reverse=True
        )
        assert margin == pytest.approx(cosines[0] - cosines[3], abs=1e-6)


# CKA


def dense_cka(a: np.ndarray, b: np.ndarray, weights: np.ndarray) -> float:
    """By the (n, n) matrices; rows count by their weights, which sum to 1."""
    root = np.sqrt(weights)[:, None]
    x, y = (root * (rows - weights @ rows) for rows in (a, b))
    k, m = x @ x.T, y @ y.T
    return float((k * m).sum() / math.sqrt((k * k).sum() * (m * m).sum()))


@pytest.mark.parametrize(("n", "d", "e"), [(50, 6, 9), (12, 20, 30)])
def test_linear_cka_equals_the_dense_formula(n: int, d: int, e: int) -> None:
    a = torch.randn(n, d)
    b = a @ torch.randn(d, e) + torch.randn(n, e)
    expected = dense_cka(unit(a), unit(b), np.full(n, 1 / n))
    assert float(linear_cka(a, b)) == pytest.approx(expected, abs=1e-12)
    assert 0 < expected < 1
    assert float(linear_cka_rows(a, b).mean()) == pytest.approx(expected, abs=1e-12)


def test_linear_cka_sees_neither_rotation_nor_length() -> None:
    a = torch.randn(100, 8)
    assert float(linear_cka(a, 5 * a @ rotation(8))) == pytest.approx(1, abs=1e-5)
    assert float(linear_cka(a, torch.randn(100, 8))) < 0.3


def test_linear_cka_of_rows_that_are_all_alike_is_undefined() -> None:
    assert linear_cka(torch.ones(20, 4), torch.randn(20, 4)).isnan()
    assert linear_cka(torch.randn(20, 4), torch.randn(1, 4).expand(20, 4)).isnan()


def derivative(statistic, n: int, row: int, step: float = 1e-5) -> float:  # type: ignore[no-untyped-def]
    """Of a statistic of weighted rows, as weight moves from all rows to one: the influence of that row."""
    toward = np.eye(n)[row] - 1 / n
    return (statistic(1 / n + step * toward) - statistic(1 / n - step * toward)) / (2 * step)


def test_rows_of_cka_are_the_value_plus_the_influence_of_each_row() -> None:
    a = torch.randn(30, 5)
    b = a @ torch.randn(5, 7) + 0.5 * torch.randn(30, 7)
    rows, value = linear_cka_rows(a, b), float(linear_cka(a, b))
    for row in range(0, 30, 7):
        expected = derivative(lambda weights: dense_cka(unit(a), unit(b), weights), 30, row)
        assert float(rows[row]) - value == pytest.approx(expected, abs=1e-7)


# Effective rank


def rank(rows: np.ndarray, weights: np.ndarray) -> float:
    singular = np.linalg.svd(np.sqrt(weights)[:, None] * rows, compute_uv=False)
    shares = singular[singular > 1e-12] / singular.sum()
    return math.exp(-(shares * np.log(shares)).sum())


@pytest.mark.parametrize(("n", "d"), [(60, 8), (12, 40)])
def test_rows_of_the_effective_rank_are_the_value_plus_the_influence_of_each_row(n: int, d: int) -> None:
    rows = torch.randn(n, d, dtype=torch.float64) * torch.linspace(0.1, 2, d, dtype=torch.float64)
    found, value = effective_rank_rows(rows), float(effective_rank(rows))
    assert float(found.mean()) == pytest.approx(value, abs=1e-9)
    for row in range(0, n, 5):
        expected = derivative(lambda weights: rank(rows.numpy(), weights), n, row)
        assert float(found[row]) - value == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    ("spectrum", "expected"),
    [([1.0] * 5, 5), ([1.0, 0.0, 0.0, 0.0, 0.0], 1), ([0.0] * 5, 0), ([3.0, 1.0, 0.0, 0.0, 0.0], 4 / 3**0.75)],
)
def test_effective_rank_of_spectra_that_are_known(spectrum: list[float], expected: float) -> None:
    left, right = torch.linalg.qr(torch.randn(40, 5).double())[0], rotation(5).double()
    rows = left @ torch.diag(torch.tensor(spectrum).double()) @ right
    assert float(effective_rank_rows(rows).mean()) == pytest.approx(expected, abs=1e-6)
    assert float(effective_rank(rows)) == pytest.approx(expected, abs=1e-6)


def test_directions_that_are_not_there_count_nothing() -> None:
    narrow = torch.randn(300, 6)
    wide = F.pad(narrow, (0, 250)) @ rotation(256)
    assert float(effective_rank_rows(wide.double()).mean()) == pytest.approx(float(effective_rank(narrow)), rel=1e-3)


# Intervals


def sample(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    scale = torch.tensor([2.0, 1.5, 1.0, 0.7, 0.5])
    a = torch.randn(n, 5) * scale
    return a, a + 0.8 * torch.randn(n, 5)


@pytest.mark.parametrize("name", ["cka", "rank"])
def test_intervals_of_the_rows_cover_as_often_as_they_say(name: str) -> None:
    def rows(n: int) -> torch.Tensor:
        a, b = sample(n)
        return linear_cka_rows(a, b) if name == "cka" else effective_rank_rows(F.normalize(b, dim=1))

    truth = float(rows(200_000).mean())
    found = [bootstrap_interval(rows(150), samples=300, seed=seed) for seed in range(150)]
    covered = sum(interval.low <= truth <= interval.high for interval in found) / len(found)
    assert 0.87 < covered <= 0.99


def test_resampling_the_rows_themselves_would_leave_the_value_out() -> None:
    a, b = torch.randn(40, 30), torch.randn(40, 30)
    draws = [torch.randint(40, (40,)) for _ in range(100)]
    resampled = torch.stack([linear_cka(a[draw], b[draw]) for draw in draws])
    assert resampled.quantile(0.05) > linear_cka(a, b)
    interval = bootstrap_interval(linear_cka_rows(a, b))
    assert interval.low < float(linear_cka(a, b)) < interval.high
