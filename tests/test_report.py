"""What stands on the screen at the end of a run: readable at 120 columns, with the numbers of the scores."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from distill import report
from distill.encoder import Encoder
from distill.evaluation import Score, Scores, fidelity_slices
from distill.evaluation.scores import rank_score
from distill.metrics import bootstrap_interval
from distill.training import Run

METRIC = "overlap@10 in teacher's index"
SYSTEMS = ["teacher", "untrained start", "untrained start -> teacher's index", "student", "student -> teacher's index"]
METRICS = [
    "cacm-docs ndcg@10",
    "cacm-docs recall@10",
    "stsb-en-dev spearman",
    "banking77-test accuracy",
    "cosine to teacher",
]


@pytest.fixture
def scores() -> Scores:
    def row(level: float) -> dict[str, Score]:
        values = [level * torch.linspace(0.8, 1, 50, dtype=torch.float64) for _ in METRICS]
        return {name: Score(bootstrap_interval(v), v) for name, v in zip(METRICS, values, strict=True)}

    table = {name: row(level) for name, level in zip(SYSTEMS, (0.8, 0.4, 0.5, 0.6, 0.7), strict=True)}
    del table["teacher"]["cosine to teacher"]
    speeds = {
        "teacher": {"parameters": 109_486_464, "bytes": 437_945_856, "texts_per_second": 58.1},
        "student": {"parameters": 7_945_472, "bytes": 31_781_888, "texts_per_second": 20_512.7},
    }
    return Scores(table, speeds)


@pytest.fixture
def run(tiny_bert: Path) -> Run:
    student = Encoder.from_pretrained(tiny_bert)
    return Run(student, 160, 12.3, 4000.0, 0.1, Path("runs/mine"), "4,000 texts, 3.0% cut by the student")


def test_the_summary_fits_the_screen_and_says_what_a_user_asks(scores: Scores, run: Run) -> None:
    text = report.summary(run, scores)
    assert all(len(line) <= 120 for line in text.splitlines()), text
    plain = " ".join(text.split())
    assert "keeps of the teacher's scores: cacm-docs ndcg@10 75.0%" in plain
    assert "with the teacher's index, only queries by the student: cacm-docs ndcg@10 87.5%" in plain
    assert "gained by training: cacm-docs ndcg@10 +0.180 [+0.177, +0.183]" in plain
    assert "13.8x fewer parameters, 353.1x the texts/s" in plain
    assert 'SentenceTransformer("runs/mine/student")' in text
    assert "runs/mine/report.json" in text


def test_the_summary_of_a_kept_index_says_what_it_gives_with_new_documents_and_how_faithful_it_is(
    scores: Scores, run: Run
) -> None:
    scores.table["student -> mixed index"] = dict(scores.table["student"])
    teacher = torch.randn(50, 8)
    slices = {"student": fidelity_slices(teacher + 0.1 * torch.randn(50, 8), teacher)}
    text = report.summary(run, Scores(scores.table, scores.speeds, slices))
    assert all(len(line) <= 120 for line in text.splitlines()), text
    plain, whole = " ".join(text.split()), slices["student"][0]
    assert "with an index half of whose documents the student added: cacm-docs ndcg@10 75.0%" in plain
    assert f"fidelity, further: neighbour overlap@10 {whole.scores['neighbour overlap@10']}" in plain
    assert f", {METRIC} {whole.scores[METRIC]}, similarity" in plain
    assert f", CKA {whole.scores['CKA']}, effective rank {whole.scores['effective rank']}" in plain
    assert f"effective rank of teacher {whole.teacher['effective rank']}" in plain


def test_what_training_gained_in_a_rank_correlation_is_paired(scores: Scores) -> None:
    gold = torch.randn(60)
    for name, noise in (("untrained start", 2.0), ("student", 0.2)):
        scores.table[name]["stsb-en-dev spearman"] = rank_score(gold + noise * torch.randn(60), gold)
    gain = report.gains(scores)["stsb-en-dev spearman"]
    ends = [scores.table[name]["stsb-en-dev spearman"].interval.value for name in ("student", "untrained start")]
    assert gain.value == pytest.approx(ends[0] - ends[1])
    assert 0 < gain.low < gain.high < 1


def test_every_value_stands_in_its_row_and_column(scores: Scores) -> None:
    lines = str(scores).splitlines()
    assert lines[0].split("  ")[0] == ""
    start = lines[0].index("student", lines[0].index("untrained start", lines[0].index("untrained start") + 1) + 15)
    [line] = [line for line in lines if line.startswith("banking77-test accuracy")]
    interval = scores.table["student"]["banking77-test accuracy"].interval
    assert line[start:].startswith(f"{interval.value:.3f} ±{(interval.high - interval.low) / 2:.3f}")
    assert next(line for line in lines if line.startswith("parameters")).split()[1:] == ["109M", "7.95M"]


def test_a_teacher_score_of_zero_has_no_retention(scores: Scores) -> None:
    zero = torch.zeros(50, dtype=torch.float64)
    scores.table["teacher"]["cacm-docs ndcg@10"] = Score(bootstrap_interval(zero), zero)
    assert "cacm-docs ndcg@10" not in scores.kept("student")
    assert scores.kept("nobody") == {}


def test_texts_of_the_evaluation_among_the_training_texts_are_counted_in_a_line(scores: Scores, run: Run) -> None:
    assert "among the training texts" not in report.summary(run, scores)
    seen = replace(scores, seen_in_training={"queries of cacm-docs": 52, "sentences of sts": 2910})
    assert "\namong the training texts: 52 queries of cacm-docs, 2,910 sentences of sts\n" in report.summary(run, seen)


def test_without_scores_there_is_still_a_student(run: Run) -> None:
    text = report.summary(run, Scores({"teacher": {}, "student": {}}, {}))
    assert text.startswith("\nnothing was measured: no text was held out (--held-out)")
    assert "keeps" not in text
    assert 'SentenceTransformer("runs/mine/student")' in text
