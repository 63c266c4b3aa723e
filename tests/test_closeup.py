"""The texts of a page: which are chosen, and whose neighbours are wrong."""

import json

import pytest
import torch
import torch.nn.functional as F

from distill import metrics
from distill.evaluation import Scores, closeup, closeup_json
from distill.evaluation.closeup import CHARACTERS, close_groups, shortened, worst_cases

TEXTS = [f"text {number}" for number in range(120)]


@pytest.fixture
def teacher() -> torch.Tensor:
    """Eight crowds of twelve, and loners."""
    crowds = torch.randn(8, 32).repeat_interleave(12, 0) + 0.1 * torch.randn(96, 32)
    return F.normalize(torch.cat([crowds, torch.randn(24, 32)])[torch.randperm(120)], dim=1)


@pytest.fixture
def student(teacher: torch.Tensor) -> torch.Tensor:
    return teacher + 0.1 * torch.randn(120, 32)


def test_groups_are_close_within_and_far_between(teacher: torch.Tensor) -> None:
    rows = close_groups(teacher)
    assert len(set(rows.tolist())) == 20
    cosines = (teacher[rows] @ teacher[rows].T).reshape(5, 4, 5, 4)
    within = torch.stack([cosines[g, :, g, :] for g in range(5)])
    between = torch.stack([cosines[g, :, h, :] for g in range(5) for h in range(5) if g != h])
    assert within.min() > 0.8 > 0.5 > between.max()


@pytest.mark.parametrize("rows", [1, 2, 19, 20])
def test_few_texts_are_all_chosen(rows: int) -> None:
    assert close_groups(torch.randn(rows, 4)).tolist() == list(range(rows))
    found = closeup(TEXTS[:rows], torch.randn(rows, 4), torch.randn(rows, 4))
    assert found.teacher.shape == (rows, rows)
    assert found.worst == [], "chance alone shares half of ten neighbours or more"


def test_more_than_twenty_texts_have_worst_cases() -> None:
    assert len(closeup(TEXTS[:21], torch.randn(21, 4), torch.randn(21, 4)).worst) == 5


def test_equal_rows_and_zero_rows_can_be_grouped() -> None:
    for vectors in (torch.ones(40, 4), torch.zeros(40, 4)):
        assert len(set(close_groups(vectors).tolist())) == 20


def test_the_worst_are_those_of_the_least_overlap_with_the_neighbours_of_each(
    student: torch.Tensor, teacher: torch.Tensor
) -> None:
    student[7] = -teacher[7]
    overlap = metrics.index_overlap(student, teacher, 10)
    first, *others = worst_cases(TEXTS, student, teacher, k=10)
    assert (first.text, first.overlap) == ("text 7", 0.0)
    assert first.cosine == pytest.approx(-1)
    assert [case.overlap for case in others] == pytest.approx(sorted(overlap.tolist())[1:5])
    nearest = [row for row in (teacher @ teacher[7]).argsort(descending=True).tolist() if row != 7][:5]
    assert [one.text for one in first.teacher] == [TEXTS[row] for row in nearest]
    farthest = [row for row in (teacher @ teacher[7]).argsort().tolist() if row != 7][:5]
    assert [one.text for one in first.student] == [TEXTS[row] for row in farthest]
    assert not any(one.shared for one in first.teacher + first.student)
    [best] = worst_cases(TEXTS[:30], teacher[:30], teacher[:30], k=10, count=1)
    assert best.overlap == 1
    assert all(one.shared for one in best.teacher + best.student)


def test_of_texts_with_as_many_shared_neighbours_the_least_alike_come_first() -> None:
    """What a student adds on an axis that no teacher row has changes no order of theirs."""
    teacher = F.pad(torch.randn(40, 7), (0, 1))
    student = teacher + torch.linspace(0.1, 4, 40)[:, None] * torch.eye(8)[7:]
    found = worst_cases(TEXTS[:40], student, teacher, k=10)
    assert {case.overlap for case in found} == {1.0}
    alike = F.cosine_similarity(student, teacher)
    assert [case.text for case in found] == [TEXTS[row] for row in alike.argsort()[:5].tolist()]


def test_another_width_has_no_matrix_and_searches_its_own_vectors(teacher: torch.Tensor) -> None:
    found = closeup(TEXTS, teacher[:, :7], teacher)
    assert found.student is None
    assert all(case.cosine is None for case in found.worst)
    overlap = metrics.neighbour_overlap(teacher[:, :7], teacher, 10)
    assert found.worst[0].overlap == pytest.approx(float(overlap.min()))
    assert set(closeup_json({"other": found})["cosines"]) == {"teacher"}


def test_json_is_strict_and_the_exported_folder_gets_no_texts(student: torch.Tensor, teacher: torch.Tensor) -> None:
    closeups = {"untrained start": closeup(TEXTS, -student, teacher), "student": closeup(TEXTS, student, teacher)}
    plain = json.loads(json.dumps(closeup_json(closeups), allow_nan=False))
    assert set(plain["cosines"]) == {"teacher", "untrained start", "student"}
    assert plain["cosines"]["student"][3][5] == pytest.approx(float(closeups["student"].student[3, 5]), abs=1e-4)
    assert plain["worst"]["student"][0].keys() == {"text", "overlap", "cosine", "teacher", "student"}
    assert closeup_json({}) == {}
    scores = Scores({"teacher": {}, "student": {}}, {}, closeups=closeups)
    assert "text 1" not in json.dumps(scores.as_json())


def test_long_texts_are_one_short_line() -> None:
    assert shortened("a\n b\t c") == "a b c"
    assert len(shortened("word " * 1000)) <= CHARACTERS
    assert shortened("word " * 1000).endswith("…")
