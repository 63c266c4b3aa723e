"""Fidelity in full: slices that add up to the whole, what is compared in pairs, and how it is shown."""

import itertools
import json
import math

import pytest
import torch
import torch.nn.functional as F

from distill import metrics
from distill.evaluation import Score, Scores, Slice, differences_json, fidelity, fidelity_slices, slice_table
from distill.evaluation.fidelity import Reference
from distill.evaluation.scores import mean_score, rank_score

BY_ROW = ["cosine to teacher", "neighbour overlap@10", "overlap@10 in teacher's index"]


@pytest.fixture
def teacher() -> torch.Tensor:
    """Texts of some subjects: crowded neighbourhoods and lonely rows."""
    return F.normalize(torch.randn(20, 24)[torch.randint(20, (203,))] + 0.5 * torch.randn(203, 24), dim=1)


@pytest.fixture
def student(teacher: torch.Tensor) -> torch.Tensor:
    return teacher + 0.15 * torch.randn(203, 24)


@pytest.fixture
def lengths() -> torch.Tensor:
    return torch.randint(3, 30, (203,), dtype=torch.int32)


def by(slices: list[Slice], name: str) -> list[Slice]:
    return [part for part in slices if part.by == name]


def test_pairs_are_drawn_by_the_seed(student: torch.Tensor, teacher: torch.Tensor) -> None:
    one, again, other = (fidelity(student, teacher, seed=seed) for seed in (0, 0, 1))
    name = "similarity spearman"
    assert one[name].interval == again[name].interval != other[name].interval
    assert one["cosine to teacher"].interval == other["cosine to teacher"].interval


def test_the_rows_of_a_breakdown_add_up_to_the_whole(
    student: torch.Tensor, teacher: torch.Tensor, lengths: torch.Tensor
) -> None:
    slices = fidelity_slices(student, teacher, token_counts=lengths)
    [whole] = by(slices, "all")
    assert slices[0] is whole
    assert whole.texts == 203
    for name in ("tokens", "margin"):
        parts = by(slices, name)
        assert len(parts) == 4
        assert sum(part.texts for part in parts) == 203
        assert all(low.high < high.low for low, high in itertools.pairwise(parts))
        for metric in BY_ROW:
            total = sum(part.texts * part.scores[metric].interval.value for part in parts)
            assert total / 203 == pytest.approx(whole.scores[metric].interval.value, abs=1e-6)
        # Quarters, as even as equal values allow.
        assert max(part.texts for part in parts) - min(part.texts for part in parts) < 30


def test_a_slice_holds_the_numbers_of_its_own_texts(
    student: torch.Tensor, teacher: torch.Tensor, lengths: torch.Tensor
) -> None:
    part = by(fidelity_slices(student, teacher, token_counts=lengths), "tokens")[1]
    rows = (lengths >= part.low) & (lengths <= part.high)
    mine, theirs = student[rows], teacher[rows]
    found = {name: score.interval.value for name, score in part.scores.items()}
    assert found["cosine to teacher"] == pytest.approx(float(F.cosine_similarity(mine, theirs).mean()), abs=1e-6)
    overlap = metrics.neighbour_overlap(student, teacher)  # neighbours are sought among all texts
    assert found["neighbour overlap@10"] == pytest.approx(float(overlap[rows].mean()), abs=1e-6)
    assert found["CKA"] == pytest.approx(float(metrics.linear_cka(mine, theirs)))
    assert found["effective rank"] == pytest.approx(float(metrics.effective_rank(F.normalize(mine, dim=1))), rel=1e-5)
    assert part.teacher["effective rank"].interval.value == pytest.approx(
        float(metrics.effective_rank(theirs)), rel=1e-5
    )


def test_the_whole_is_that_of_the_table(student: torch.Tensor, teacher: torch.Tensor) -> None:
    whole = fidelity_slices(student, teacher)[0].scores
    table = fidelity(student, teacher)
    assert {name: whole[name].interval for name in table} == {name: score.interval for name, score in table.items()}
    assert whole.keys() - table.keys() == {"overlap@10 in teacher's index", "CKA", "effective rank"}


def test_one_reference_serves_several_students(
    student: torch.Tensor, teacher: torch.Tensor, lengths: torch.Tensor
) -> None:
    reference = Reference(teacher, lengths)
    for vectors in (student, teacher[:, :5], student):
        expected = fidelity_slices(vectors, teacher, token_counts=lengths)
        assert [part.as_json() for part in reference.slices(vectors)] == [part.as_json() for part in expected]
    with pytest.raises(ValueError, match="fidelity pairs row i"):
        reference.slices(student[:50])


def test_margins_are_the_teachers_and_neighbours_are_lost_where_they_are_small(
    student: torch.Tensor, teacher: torch.Tensor
) -> None:
    parts = by(fidelity_slices(student, teacher), "margin")
    margins = metrics.neighbour_margin(teacher)
    assert parts[0].low == pytest.approx(float(margins.min()))
    assert parts[-1].high == pytest.approx(float(margins.max()))
    other = by(fidelity_slices(teacher + torch.randn(203, 24), teacher), "margin")
    assert [(part.low, part.high, part.texts) for part in other] == [(p.low, p.high, p.texts) for p in parts]


def test_equal_lengths_are_one_slice_and_few_texts_leave_numbers_out(teacher: torch.Tensor) -> None:
    slices = fidelity_slices(teacher, teacher, token_counts=torch.full((203,), 7, dtype=torch.int32))
    assert [str(part) for part in by(slices, "tokens")] == ["tokens 7-7"]
    few = fidelity_slices(teacher[:9], teacher[:9], token_counts=torch.arange(9, dtype=torch.int32))
    assert not by(few, "margin")
    assert set(few[0].scores) == {"cosine to teacher", "similarity spearman", "CKA", "effective rank"}
    assert set(few[1].scores) == {"cosine to teacher"}
    other_width = fidelity_slices(teacher[:, :5], teacher)[0].scores
    assert set(other_width) == {"neighbour overlap@10", "similarity spearman", "CKA", "effective rank"}


@pytest.mark.parametrize("metric", [*BY_ROW, "similarity spearman", "CKA", "effective rank"])
def test_intervals_contain_the_value(student: torch.Tensor, teacher: torch.Tensor, metric: str) -> None:
    interval = fidelity_slices(student, teacher)[0].scores[metric].interval
    assert interval.low < interval.value < interval.high


# Comparison


@pytest.fixture
def scores(student: torch.Tensor, teacher: torch.Tensor, lengths: torch.Tensor) -> Scores:
    worse = teacher + 0.6 * torch.randn(203, 24)
    both = {"good": student, "bad": worse}
    slices = {name: fidelity_slices(vectors, teacher, token_counts=lengths) for name, vectors in both.items()}
    gold = torch.randn(60)
    table = {
        "good": {"sts": rank_score(gold + 0.3 * torch.randn(60), gold), "ndcg@10": mean_score(torch.rand(60))},
        "bad": {"sts": rank_score(gold + 3 * torch.randn(60), gold), "accuracy": mean_score(torch.rand(60))},
    }
    return Scores(table, {}, slices)


def test_every_number_of_fidelity_is_compared_in_pairs(scores: Scores) -> None:
    found = scores.differences("good", "bad")
    assert set(found) == {"sts", *BY_ROW, "similarity spearman", "CKA", "effective rank"}
    for metric, difference in found.items():
        values = [scores.of(name)[metric].interval.value for name in ("good", "bad")]
        assert difference.interval.value == pytest.approx(values[0] - values[1], abs=1e-9)
        assert difference.p_value < 0.02
        assert not difference.interval.low <= 0 <= difference.interval.high
    backwards = scores.differences("bad", "good")
    assert all(backwards[metric].interval.value == pytest.approx(-found[metric].interval.value) for metric in found)


def test_a_student_against_itself_differs_by_nothing(scores: Scores) -> None:
    for difference in scores.differences("good", "good").values():
        assert (difference.interval.value, difference.p_value) == (0, 1)


def test_scores_that_are_of_no_rows_are_left_out(scores: Scores) -> None:
    half = Score(metrics.Interval(value=0.5, low=0.4, high=0.6))
    table = {name: row | {"whole": half} for name, row in scores.table.items()}
    more = Scores(table, {}, scores.slices)
    assert more.differences("good", "bad").keys() == scores.differences("good", "bad").keys()
    with pytest.raises(ValueError, match="no paired difference"):
        more.compare("good", "bad", "whole")


# What is shown


def test_the_table_of_slices_fits_the_screen_with_each_value_in_its_column(scores: Scores) -> None:
    text = slice_table(scores.slices["good"])
    lines = text.splitlines()
    assert all(len(line) <= 120 for line in lines), text
    assert [line.split("  ")[0] for line in lines[3:]] == [str(part) for part in scores.slices["good"]]
    whole = scores.slices["good"][0]
    start = lines[0].index("CKA")
    interval = whole.scores["CKA"].interval
    [line] = [line for line in lines if line.startswith("all")]
    assert line[start:].startswith(f"{interval.value:.3f} ±{(interval.high - interval.low) / 2:.3f}")
    assert line.split()[1] == "203"
    teacher_rank = whole.teacher["effective rank"].interval.value
    assert line.split()[-2] == f"{teacher_rank:.1f}"


def test_json_holds_every_slice_and_no_nan(student: torch.Tensor, teacher: torch.Tensor) -> None:
    constant = torch.ones(203, 24)
    plain = Scores({"student": {}}, {}, {"student": fidelity_slices(constant, teacher)}).as_json()
    text = json.dumps(plain, allow_nan=False)
    whole, *quarters = json.loads(text)["fidelity"]["student"]
    assert whole["by"] == "all"
    assert whole["scores"]["CKA"]["value"] is None
    assert [part["by"] for part in quarters] == ["margin"] * 4
    assert {"low", "high", "texts", "scores", "teacher"} <= quarters[0].keys()
    assert "fidelity" not in Scores({"student": {}}, {}).as_json()
    undefined = metrics.Difference(interval=metrics.Interval(value=1.0, low=0.5, high=math.inf), p_value=math.nan)
    assert differences_json({"x": undefined}) == {"x": {"value": 1.0, "low": 0.5, "high": None, "p_value": None}}
