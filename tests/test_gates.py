"""Gates: what is asked is read before a run, judged by the numbers of the table, and told in a line and an exit code."""

import math
from typing import Any

import pytest
import torch

from distill.errors import GateMissed, RecipeError
from distill.evaluation import INDEX, MIXED, STUDENT, Score, Scores, fidelity_slices
from distill.evaluation.fidelity import FURTHER, HEADLINES
from distill.evaluation.scores import mean_score
from distill.gates import OF_A_RUN, enforce, judge, read_gates
from distill.metrics import Interval

TASKS = ["stsb spearman", "cacm-docs ndcg@10", "cacm-docs recall@10"]


@pytest.fixture
def scores() -> Scores:
    def row(level: float) -> dict[str, Score]:
        return {"cacm-docs ndcg@10": mean_score(level * torch.linspace(0.5, 1, 40, dtype=torch.float64))}

    teacher = torch.randn(60, 8)
    slices = fidelity_slices(teacher + 0.3 * torch.randn(60, 8), teacher)
    table = {"teacher": row(0.8), STUDENT: row(0.6) | slices[0].scores, STUDENT + INDEX: row(0.7)}
    return Scores(table, {}, {STUDENT: slices})


@pytest.mark.parametrize(
    ("text", "system", "metric", "rest"),
    [
        ("overlap@10 >= 0.6", STUDENT, "neighbour overlap@10", (">=", 0.6, False, None)),
        ("neighbour overlap@10>=.6", STUDENT, "neighbour overlap@10", (">=", 0.6, False, None)),
        ("overlap@10 low >= 0.55", STUDENT, "neighbour overlap@10", (">=", 0.55, False, "low")),
        ("overlap@10 in teacher's index > 0.5", STUDENT, "overlap@10 in teacher's index", (">", 0.5, False, None)),
        ("Cosine HIGH < 1e-1", STUDENT, "cosine to teacher", ("<", 0.1, False, "high")),
        ("cka >= 0.9", STUDENT, "CKA", (">=", 0.9, False, None)),
        ("effective rank <= 300", STUDENT, "effective rank", ("<=", 300.0, False, None)),
        ("ndcg >= 0.3", STUDENT, "cacm-docs ndcg@10", (">=", 0.3, False, None)),
        ("kept cacm recall low >= 0.9", STUDENT, "cacm-docs recall@10", (">=", 0.9, True, "low")),
        ("student -> teacher's index: ndcg@10 >= 0.5", STUDENT + INDEX, "cacm-docs ndcg@10", (">=", 0.5, False, None)),
        (
            "student  →  teacher’s index : kept ndcg@10 >= 1",
            STUDENT + INDEX,
            "cacm-docs ndcg@10",
            (">=", 1.0, True, None),
        ),
        ("untrained start: spearman stsb < 0.9", "untrained start", "stsb spearman", ("<", 0.9, False, None)),
        ("teacher: ndcg@10 > -1", "teacher", "cacm-docs ndcg@10", (">", -1.0, False, None)),
    ],
)
def test_a_gate_is_read_with_the_names_of_the_table(text: str, system: str, metric: str, rest: tuple[Any, ...]) -> None:
    [gate] = read_gates([text], TASKS)
    assert (gate.system, gate.metric) == (system, metric)
    assert (gate.operator, gate.bound, gate.kept, gate.end) == rest


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("overlap@10", r'a score, >= or <= and a number, as "overlap@10 >= 0\.6"'),
        ("overlap@10 >= 60%", "and a number"),
        ("overlap@10 == 1", "and a number"),
        (">= 1", "and a number"),
        ("overlap@1 >= 0.6", r"no score 'overlap@1'\. Did you mean .*'neighbour overlap@10'"),
        ("cos >= 0.6", "no score 'cos'.* There are: cosine to teacher"),
        ("ndgc@10 >= 0.6", "Did you mean 'cacm-docs ndcg@10'"),
        ("spearman >= 0.6", "'spearman' may be 'similarity spearman' or 'stsb spearman'; give the whole name"),
        ("teacher: overlap@10 >= 0.6", r"no score 'overlap@10'.* There are: stsb spearman, cacm"),
        ("kept overlap@10 >= 0.6", "no score 'overlap@10'"),
        ("student -> teacher's index: stsb >= 0.6", "There are: cacm-docs ndcg@10, cacm-docs recall@10"),
        ("student -> teacher index: ndcg@10 >= 0.6", 'no system .* Did you mean "student -> teacher\'s index"'),
        ("student -> mixed index: ndcg@10 >= 0.6", "no system 'student -> mixed index'"),
    ],
)
def test_what_there_will_not_be_is_refused_with_what_is_near(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        read_gates([text], TASKS)


@pytest.mark.parametrize(
    ("text", "system", "metric"),
    [
        ("stsb:dev spearman >= 0.8", STUDENT, "stsb:dev spearman"),
        ("kept stsb:dev >= 0.8", STUDENT, "stsb:dev spearman"),
        ("untrained start: stsb:dev spearman >= 0.8", "untrained start", "stsb:dev spearman"),
        ("student -> teacher's index: kept docs:en:test ndcg@10 >= 0.8", STUDENT + INDEX, "docs:en:test ndcg@10"),
    ],
)
def test_a_score_may_have_a_colon_in_its_name(text: str, system: str, metric: str) -> None:
    [gate] = read_gates([text], ["stsb:dev spearman", "docs:en:test ndcg@10"])
    assert (gate.system, gate.metric, gate.kept) == (system, metric, "kept" in text)


def test_without_labelled_data_only_fidelity_can_be_asked() -> None:
    assert read_gates(["overlap@10 >= 0.6"], [])
    with pytest.raises(RecipeError, match="There are no labelled data to score on"):
        read_gates(["student -> teacher's index: ndcg@10 >= 0.6"], [])


def test_the_first_system_is_meant_and_is_the_student_by_another_name() -> None:
    systems = ["a/student", "a/student" + INDEX, "b/student", "b/student" + INDEX, "teacher"]
    texts = ["ndcg >= 0", "student: ndcg >= 0", "student -> teacher's index: ndcg >= 0", "b/student: ndcg >= 0"]
    gates = read_gates(texts, TASKS, systems)
    assert [gate.system for gate in gates] == ["a/student", "a/student", "a/student" + INDEX, "b/student"]
    assert read_gates(["student -> mixed index: ndcg >= 0"], TASKS, (*OF_A_RUN, STUDENT + MIXED))


def test_a_model_that_is_called_student_is_meant_by_that_name() -> None:
    systems = ["a/other", "a/other" + INDEX, "student", "student" + INDEX, "teacher"]
    texts = ["ndcg >= 0", "student: ndcg >= 0", "student -> teacher's index: ndcg >= 0"]
    gates = read_gates(texts, TASKS, systems)
    assert [gate.system for gate in gates] == ["a/other", "student", "student" + INDEX]


def test_the_names_of_fidelity_are_those_that_are_measured() -> None:
    found = fidelity_slices(torch.randn(30, 8), torch.randn(30, 8))[0].scores
    assert set(found) == {*HEADLINES, *FURTHER}


def test_a_gate_is_judged_by_value_by_an_end_or_by_the_share_of_the_teachers(scores: Scores) -> None:
    overlap = scores.of(STUDENT)["neighbour overlap@10"].interval
    between = (overlap.low + overlap.value) / 2
    texts = [f"overlap@10 >= {between}", f"overlap@10 low >= {between}", f"overlap@10 <= {between}"]
    texts += ["kept ndcg >= 0.7", "kept ndcg >= 0.8", "student -> teacher's index: kept ndcg low >= 0.87"]
    assert [verdict.passed for verdict in judge(read_gates(texts, TASKS), scores)] == [
        True,
        False,
        False,
        True,
        False,
        True,
    ]


def test_what_was_not_measured_or_is_no_number_is_missed(scores: Scores) -> None:
    scores.table[STUDENT]["stsb spearman"] = Score(Interval(value=math.nan, low=math.nan, high=math.nan))
    gates = read_gates(["recall >= 0", "stsb >= 0", "stsb <= 1"], TASKS)
    verdicts = judge(gates, scores)
    assert [verdict.passed for verdict in verdicts] == [False] * 3
    assert str(verdicts[0]) == "gate recall >= 0: MISSED, student: cacm-docs recall@10 was not measured"
    assert [verdict.as_json()["score"] for verdict in verdicts] == [
        None,
        *[{"value": None, "low": None, "high": None}] * 2,
    ]


def test_one_line_a_gate_and_an_exit_code_of_its_own(scores: Scores, capsys: pytest.CaptureFixture[str]) -> None:
    verdicts = judge(read_gates(["ndcg >= 0.3", "kept ndcg >= 0.8", "overlap@10 >= 2"], TASKS), scores)
    with pytest.raises(GateMissed, match=r"2 of 3 gates missed: kept ndcg >= 0\.8; overlap@10 >= 2") as raised:
        enforce(verdicts)
    lines = capsys.readouterr().out.split("\n")
    assert [line.partition(", ")[0] for line in lines if line] == [
        "gate ndcg >= 0.3: passed",
        "gate kept ndcg >= 0.8: MISSED",
        "gate overlap@10 >= 2: MISSED",
    ]
    assert "student: kept cacm-docs ndcg@10 is 0.750 [0.750, 0.750]" in lines[2]
    assert raised.value.exit_code == 7
    enforce(verdicts[:1])
    enforce([])
    assert capsys.readouterr().out.count("gate ") == 1
