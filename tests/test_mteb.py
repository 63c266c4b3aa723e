"""MTEB: our results in its form, read by its own classes; its evaluation on our encoders."""

import importlib.util
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import runs
import tiny
import torch

from distill import students
from distill.data import Labelled, Pairs, Retrieval
from distill.encoder import Encoder
from distill.errors import RecipeError, ResourceError
from distill.evaluation import EvaluationData, Score, Scores, evaluate, mteb
from distill.metrics import Interval
from distill.modules import Truncate

installed = pytest.mark.skipif(importlib.util.find_spec("mteb") is None, reason="the extra mteb is not installed")
PAIRS = Pairs(sentence1=tiny.SENTENCES[:6], sentence2=tiny.SENTENCES[6:], score=[0.0, 1.0, 5.0, 2.5, 3.0, 4.0])


@pytest.fixture
def teacher(tiny_bert: Path) -> Encoder:
    return Encoder.from_pretrained(tiny_bert)


@pytest.fixture
def data() -> EvaluationData:
    ids = [str(number) for number in range(len(tiny.SENTENCES))]
    queries = [" ".join(text.split()[:4]) for text in tiny.SENTENCES]
    grades = {number: {number: 1} for number in ids}
    task = Retrieval(corpus_ids=ids, corpus=tiny.SENTENCES, query_ids=ids, queries=queries, qrels=grades)
    test = Labelled(texts=tiny.SENTENCES[6:], labels=[0, 1] * 3, names=["a", "b"])
    labelled = Labelled(texts=tiny.SENTENCES[:6], labels=[0, 1] * 3, names=["a", "b"], test=test)
    return EvaluationData(pairs={"my-sts": PAIRS}, retrieval={"docs": task}, labelled={"kinds": labelled})


@pytest.fixture
def scored(teacher: Encoder, data: EvaluationData, tmp_path: Path) -> tuple[dict[str, Encoder], Scores]:
    encoders = {"runs/mine/student": students.static(teacher, width=8)}
    for name, encoder in encoders.items():
        encoder.name = name
    return encoders, evaluate(encoders, teacher, data, store=tmp_path / "store", speed=False)


def test_each_task_of_a_model_is_a_file(scored: tuple, data: EvaluationData, tmp_path: Path) -> None:
    encoders, scores = scored
    paths = mteb.write_results(scores, data, encoders, tmp_path)
    student = encoders["runs/mine/student"]
    place = tmp_path / "results" / "mine__student" / mteb.revision(student)
    assert paths == [place / f"{name}.json" for name in ("my-sts", "docs", "kinds")]
    [subset] = json.loads(paths[1].read_text())["scores"]["test"]
    row = scores.table["runs/mine/student"]
    assert subset["main_score"] == subset["ndcg_at_10"] == row["docs ndcg@10"].interval.value
    assert subset["recall_at_10"] == row["docs recall@10"].interval.value


def test_a_model_without_a_result_has_no_folder(
    scored: tuple, teacher: Encoder, data: EvaluationData, tmp_path: Path
) -> None:
    encoders, scores = scored
    teacher.name = "runs/mine/other"
    assert len(mteb.write_results(scores, data, {**encoders, teacher.name: teacher}, tmp_path)) == 3
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["mine__student"]


def test_a_score_that_is_undefined_is_no_result(scored: tuple, data: EvaluationData, tmp_path: Path) -> None:
    encoders, scores = scored
    nothing = Score(Interval(value=math.nan, low=math.nan, high=math.nan))
    undefined = Scores({name: dict.fromkeys(row, nothing) for name, row in scores.table.items()}, {})
    assert mteb.write_results(undefined, data, encoders, tmp_path) == []


def test_a_revision_is_what_is_in_the_files(scored: tuple, data: EvaluationData, tmp_path: Path) -> None:
    encoders, scores = scored
    before = {path.name: json.loads(path.read_text()) for path in mteb.write_results(scores, data, encoders, tmp_path)}
    now = replace(PAIRS, score=[*PAIRS.score[:5], 4.5])
    changed = EvaluationData(pairs={"my-sts": now}, retrieval=data.retrieval, labelled=data.labelled)
    after = {
        path.name: json.loads(path.read_text()) for path in mteb.write_results(scores, changed, encoders, tmp_path)
    }
    differ = [name for name in before if before[name]["dataset_revision"] != after[name]["dataset_revision"]]
    assert differ == ["my-sts.json"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("org/model", "org/model"),
        ("student", "local/student"),
        ("/a/b/c", "b/c"),
        ("/c", "local/c"),
        ("../x/", "local/x"),
    ],
)
def test_a_model_has_an_owner_and_a_name(teacher: Encoder, name: str, expected: str) -> None:
    teacher.name = name
    assert mteb.model_name(teacher) == expected
    assert len(mteb.revision(teacher)) == 40
    teacher.commit = "a" * 40
    assert mteb.revision(teacher) == "a" * 40


def test_a_student_that_gives_other_vectors_has_another_revision(teacher: Encoder, tmp_path: Path) -> None:
    """With the same weights; the result of one would be shown for the other."""
    teacher.save_pretrained(tmp_path / "student")
    found = {mteb.revision(teacher), mteb.revision(Encoder.from_pretrained(tmp_path / "student"))}
    assert len(found) == 1
    for changed in range(1, 5):
        other = Encoder.from_pretrained(tmp_path / "student")
        other.head = torch.nn.Sequential(*other.head, *([Truncate(8)] if changed == 1 else []))
        other.max_length -= changed == 2
        other.prompts |= {"query": "find: "} if changed > 2 else {}
        other.default_prompt_name = "query" if changed == 4 else None
        found.add(mteb.revision(other))
        assert len(found) == 1 + changed


def test_mteb_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mteb.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r'pip install "distill\[mteb\]"'):
        mteb.find_tasks(["STSBenchmark"])


@installed
def test_mteb_reads_our_results(scored: tuple, data: EvaluationData, tmp_path: Path) -> None:
    from mteb import ResultCache
    from mteb.results import TaskResult

    encoders, scores = scored
    paths = mteb.write_results(scores, data, encoders, tmp_path)
    results = [TaskResult.from_disk(path) for path in paths]
    assert [result.task_name for result in results] == ["my-sts", "docs", "kinds"]
    row = scores.table["runs/mine/student"]
    expected = [row[name].interval.value for name in ("my-sts spearman", "docs ndcg@10", "kinds accuracy")]
    assert [result.get_score() for result in results] == pytest.approx(expected)
    [model] = ResultCache(tmp_path).load_results(include_remote=False).model_results
    assert (model.model_name, len(model.task_results)) == ("mine/student", 3)


def own_sts() -> Any:
    """A task of MTEB's kind on sentences of ours."""
    from datasets import Dataset, DatasetDict
    from mteb.abstasks.sts import AbsTaskSTS
    from mteb.abstasks.task_metadata import TaskMetadata

    class OwnSTS(AbsTaskSTS):
        metadata = TaskMetadata(
            name="OwnSTS",
            description="pairs of the tests",
            type="STS",
            main_score="cosine_spearman",
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            dataset={"path": "own/sts", "revision": "1"},
        )
        min_score, max_score = 0, 5

        def load_data(self, **_: Any) -> None:
            columns = {"sentence1": PAIRS.sentence1, "sentence2": PAIRS.sentence2, "score": PAIRS.score}
            self.dataset = DatasetDict({"test": Dataset.from_dict(columns)})
            self.data_loaded = True

    return OwnSTS()


@installed
def test_mteb_scores_an_encoder_as_we_do(scored: tuple, tmp_path: Path) -> None:
    encoders, scores = scored
    found = mteb.run_tasks(encoders, [own_sts()], tmp_path)
    expected = scores.table["runs/mine/student"]["my-sts spearman"].interval.value
    assert found == {"runs/mine/student": {"OwnSTS": pytest.approx(expected, abs=1e-5)}}
    student = encoders["runs/mine/student"]
    place = tmp_path / "results" / mteb.model_name(student).replace("/", "__") / mteb.revision(student)
    assert (place / "OwnSTS.json").exists()
    meta = json.loads((place / "model_meta.json").read_text())
    assert (meta["name"], meta["revision"], meta["embed_dim"]) == ("mine/student", mteb.revision(student), 32)


@installed
def test_queries_and_documents_get_the_prompt_of_their_role(tiny_model: Any) -> None:
    from mteb.types import PromptType

    folder = tiny_model("bert", layers=1, prompts={"query": "find: ", "document": ""})
    encoder = mteb.MtebEncoder(Encoder.from_pretrained(folder))
    batches = [{"text": tiny.SENTENCES[:3]}, {"text": tiny.SENTENCES[3:5]}]
    for role in ("query", "document"):
        expected = encoder.encoder.encode(tiny.SENTENCES[:5], role=role)
        assert (encoder.encode(batches, prompt_type=PromptType(role)) - expected).abs().max() == 0
    assert (encoder.encode(batches) - encoder.encoder.encode(tiny.SENTENCES[:5])).abs().max() == 0


@installed
def test_mtebs_own_small_tasks_run(teacher: Encoder, tmp_path: Path) -> None:
    from mteb.mocks import MockClassificationTask, MockRetrievalTask

    found = mteb.run_tasks({"teacher": teacher}, [MockRetrievalTask(), MockClassificationTask()], tmp_path)
    assert set(found["teacher"]) == {"MockRetrievalTask", "MockClassificationTask"}


@installed
def test_tasks_that_do_not_exist_or_whose_data_are_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match=r"no task 'STSBenchmrk'.*STSBenchmark"):
        mteb.find_tasks(["STSBenchmrk"])
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ResourceError, match="could not be reached"):
        mteb.find_tasks(["STSBenchmark"])


def test_the_texts_of_runs_are_no_tasks(scored: tuple, tmp_path: Path) -> None:
    encoders, scores = scored
    assert mteb.write_results(scores, EvaluationData(texts=runs.texts(5)), encoders, tmp_path) == []
    assert not (tmp_path / "results").exists()
