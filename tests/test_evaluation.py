"""Scores against hand-computed and scipy values; roles, prompts and the store in the whole evaluation."""

import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import scipy.stats
import tiny
import torch
import torch.nn.functional as F

from distill import students
from distill.data import Labelled, Pairs, Retrieval
from distill.embed import embed
from distill.encoder import Encoder
from distill.errors import DataError
from distill.evaluation import (
    EvaluationData,
    Score,
    Scores,
    centroid_accuracy,
    evaluate,
    fidelity,
    mixed_index,
    retrieval,
    similarity_pairs,
    task_scores,
)
from distill.evaluation.speed import FIRST, speeds
from distill.evaluation.systems import _once
from distill.metrics import Interval

PROMPTS = {"query": "How do I find ", "document": "Interest rates: "}

TEXTS = [*tiny.SENTENCES, *(f"{text} Again." for text in tiny.SENTENCES)]


def task(qrels: dict[str, dict[str, int]], queries: int = 3) -> Retrieval:
    ids = [f"q{number}" for number in range(queries)]
    return Retrieval(
        corpus_ids=["a", "b", "c", "d"], corpus=["?"] * 4, query_ids=ids, queries=["?"] * queries, qrels=qrels
    )


@pytest.fixture
def prompted(tmp_path: Path) -> Encoder:
    """A teacher that reads queries and documents behind prompts."""
    return Encoder.from_pretrained(tiny.bert(tmp_path / "prompted", layers=2, prompts=PROMPTS))


@pytest.fixture
def texts_task() -> Retrieval:
    queries = [text.split(",")[0].split(".")[0][:30] for text in tiny.SENTENCES]
    ids = [str(number) for number in range(len(queries))]
    qrels = {name: {name: 1} for name in ids[:10]}
    return Retrieval(corpus_ids=ids, corpus=tiny.SENTENCES, query_ids=ids, queries=queries, qrels=qrels)


# Fidelity


def test_fidelity_of_equal_vectors_is_one() -> None:
    vectors = torch.randn(100, 16)
    scores = fidelity(vectors, 3 * vectors)
    assert set(scores) == {"cosine to teacher", "neighbour overlap@10", "similarity spearman"}
    assert all(score.interval.value == pytest.approx(1, abs=1e-6) for score in scores.values())


def test_fidelity_of_a_rotated_copy_keeps_everything_but_the_cosine() -> None:
    vectors = torch.randn(100, 16)
    rotation, _ = torch.linalg.qr(torch.randn(16, 16))
    scores = fidelity(vectors @ rotation, vectors)
    assert scores["neighbour overlap@10"].interval.value == pytest.approx(1, abs=1e-3)
    assert scores["similarity spearman"].interval.value == pytest.approx(1, abs=1e-6)
    assert scores["cosine to teacher"].interval.value < 0.7


def test_fidelity_of_unrelated_vectors_is_what_chance_gives() -> None:
    scores = fidelity(torch.randn(400, 32), torch.randn(400, 32))
    assert abs(scores["cosine to teacher"].interval.value) < 0.03
    assert scores["neighbour overlap@10"].interval.value == pytest.approx(10 / 399, abs=0.02)
    assert abs(scores["similarity spearman"].interval.value) < 0.2


def test_fidelity_across_widths_leaves_the_cosine_out_and_few_texts_leave_more_out() -> None:
    assert set(fidelity(torch.randn(21, 4), torch.randn(21, 8))) == {"neighbour overlap@10", "similarity spearman"}
    assert set(fidelity(torch.randn(20, 4), torch.randn(20, 8))) == {"similarity spearman"}  # half are shared by chance
    assert set(fidelity(torch.randn(8, 4), torch.randn(8, 4))) == {"cosine to teacher", "similarity spearman"}
    assert set(fidelity(torch.randn(2, 4), torch.randn(2, 4))) == {"cosine to teacher"}


@pytest.mark.parametrize("name", ["cosine to teacher", "neighbour overlap@10", "similarity spearman"])
def test_intervals_contain_the_value(name: str) -> None:
    teacher = torch.randn(200, 16)
    interval = fidelity(teacher + torch.randn(200, 16), teacher)[name].interval
    assert interval.low < interval.value < interval.high


# Retrieval


def test_retrieval_equals_the_computation_by_hand() -> None:
    documents = torch.eye(4)
    # Rankings: q0 d, c, b, a (relevant: c grade 2, a grade 1); q1 a first (relevant: a); q2 has no judgement.
    queries = torch.tensor([[1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    scores = retrieval(queries, documents, task({"q0": {"c": 2, "a": 1, "b": 0}, "q1": {"a": 1}}), k=3)
    first = (2 / math.log2(3)) / (2 / math.log2(2) + 1 / math.log2(3))
    assert scores["ndcg@3"].values.tolist() == pytest.approx([first, 1.0])
    assert scores["ndcg@3"].interval.value == pytest.approx((first + 1) / 2)
    assert scores["recall@3"].values.tolist() == [0.5, 1.0]


def test_queries_without_a_relevant_document_do_not_count() -> None:
    queries = torch.eye(4)[:3]
    judged = retrieval(queries, torch.eye(4), task({"q0": {"a": 1}}))
    nothing = retrieval(queries, torch.eye(4), task({"q0": {"a": 1}, "q1": {"b": 0}}))
    assert judged["ndcg@10"].values.tolist() == nothing["ndcg@10"].values.tolist() == [1.0]


def test_a_task_in_which_nothing_can_be_found_is_refused_before_anything_is_computed() -> None:
    with pytest.raises(DataError, match="docs has no query with a relevant document"):
        EvaluationData(retrieval={"docs": task({"q0": {"a": 0}})})


# Labels


def test_sts_equals_scipy() -> None:
    first, second, gold = torch.randn(50, 8), torch.randn(50, 8), (5 * torch.rand(50)).round().tolist()
    score = similarity_pairs(first, second, Pairs(sentence1=["?"] * 50, sentence2=["?"] * 50, score=gold))
    expected = scipy.stats.spearmanr(F.cosine_similarity(first, second), gold).statistic
    assert score.interval.value == pytest.approx(expected, abs=1e-9)
    assert score.interval.low < expected < score.interval.high


def labelled(labels: list[int], test: list[int]) -> Labelled:
    names = ["x", "y", "z"]
    held_out = Labelled(texts=["?"] * len(test), labels=test, names=names)
    return Labelled(texts=["?"] * len(labels), labels=labels, names=names, test=held_out)


def test_centroid_accuracy_is_the_share_nearest_to_the_mean_direction_of_its_class() -> None:
    centres = torch.eye(3, 8)
    labels, test = [0, 1, 2] * 10, [0, 1, 2] * 5
    train = 5 * centres[labels] + 0.3 * torch.randn(30, 8)
    vectors = centres[test] + 0.1 * torch.randn(15, 8)
    vectors[0] = centres[1]  # one of 15 lies in the wrong class
    assert centroid_accuracy(train, vectors, labelled(labels, test)).interval.value == pytest.approx(14 / 15)


def test_a_class_without_a_direction_is_given_to_no_text() -> None:
    labels, test = [0, 1] * 10, [0, 1, 2] * 5
    vectors = -torch.eye(3, 8)[test]  # all cosines to the classes that are there are 0 or less
    for test_vectors, right in ((vectors, [0.0, 0.0, 0.0]), (-vectors, [1.0, 1.0, 0.0])):
        score = centroid_accuracy(torch.eye(3, 8)[labels], test_vectors, labelled(labels, test))
        assert score.values.tolist() == right * 5


# The table


def table() -> Scores:
    values = torch.tensor([0.2, 0.4, 0.6, 0.8], dtype=torch.float64)
    better = Score(Interval(value=0.6, low=0.5, high=0.7), values + 0.1)
    worse = Score(Interval(value=0.5, low=0.4, high=0.6), values)
    ranks = Score(Interval(value=0.9, low=0.8, high=0.95))
    return Scores(
        {"student": {"ndcg@10": better, "sts": ranks}, "untrained start": {"ndcg@10": worse, "sts": ranks}}, {}
    )


def test_the_paired_difference_is_that_of_the_rows() -> None:
    gain = table().compare("student", "untrained start", "ndcg@10").interval
    assert [gain.value, gain.low, gain.high] == pytest.approx([0.1] * 3)  # the rows vary, their difference does not
    with pytest.raises(ValueError, match="no paired difference"):
        table().compare("student", "untrained start", "sts")


def test_an_undefined_score_is_null_in_json() -> None:
    undefined = Score(Interval(value=math.nan, low=math.nan, high=math.nan))
    assert Scores({"student": {"x": undefined}}, {}).as_json()["scores"]["student"]["x"]["value"] is None


# Seen in training


def test_queries_sentences_and_test_texts_among_the_training_texts_are_counted(texts_task: Retrieval) -> None:
    test = Labelled(texts=["t", "u", "u"], labels=[0, 1, 1], names=["a", "b"])
    data = EvaluationData(
        pairs={"sts": Pairs(sentence1=["a", "b"], sentence2=["b", "c"], score=[0.0, 1.0])},
        retrieval={"docs": texts_task},
        labelled={"intents": Labelled(texts=["v", "w"], labels=[0, 1], names=["a", "b"], test=test)},
    )
    assert data.among(["b", "u", "v", *texts_task.corpus]) == {"sentences of sts": 1, "test texts of intents": 1}
    assert data.among(texts_task.queries) == {"queries of docs": len(set(texts_task.queries))}
    assert data.among([]) == {}


# The whole


def test_evaluate_scores_all_systems_and_the_teacher_runs_once(
    tmp_path: Path, tiny_bert: Path, texts_task: Retrieval, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = Encoder.from_pretrained(tiny_bert)
    student = students.keep_layers(teacher, 3)
    halves = labelled([0, 1, 2] * 4, [0, 1, 2])
    halves = Labelled(
        texts=tiny.SENTENCES,
        labels=halves.labels,
        names=halves.names,
        test=Labelled(texts=tiny.SENTENCES[:3], labels=[0, 1, 2], names=halves.names),
    )
    pairs = Pairs(sentence1=tiny.SENTENCES[:6], sentence2=tiny.SENTENCES[6:], score=[0.0, 1.0, 2.0, 3.0, 4.0, 5.0])
    data = EvaluationData(
        texts=TEXTS, pairs={"sts": pairs}, retrieval={"docs": texts_task}, labelled={"intents": halves}
    )
    data = replace(data, seen_in_training={"sentences of sts": 2})
    first = evaluate({"student": student, "itself": teacher}, teacher, data, store=tmp_path / "store")

    def forbidden(*_: object) -> None:
        raise AssertionError("the teacher ran again")

    for method in ("compute", "forward"):
        monkeypatch.setattr(teacher, method, forbidden)
    second = evaluate({"student": student}, teacher, data, store=tmp_path / "store", speed=False)

    assert list(first.table) == [
        "teacher",
        "student",
        "student -> teacher's index",
        "itself",
        "itself -> teacher's index",
    ]
    metrics = {"docs ndcg@10", "docs recall@10", "sts spearman", "intents accuracy"}
    assert set(first.table["teacher"]) == metrics
    assert first.as_json()["seen_in_training"] == {"sentences of sts": 2}
    assert set(task_scores(pairs=data.pairs, retrieval=data.retrieval, labelled=data.labelled)) == metrics
    assert task_scores(retrieval=[""]) == ["ndcg@10", "recall@10"]
    fidelities = {"cosine to teacher", "neighbour overlap@10", "similarity spearman"}
    assert set(first.table["student"]) == metrics | fidelities
    assert set(first.table["student -> teacher's index"]) == {"docs ndcg@10", "docs recall@10"}
    assert second.table["student"]["docs ndcg@10"].interval == first.table["student"]["docs ndcg@10"].interval
    # The teacher as its own student: faithful but for the store's float16.
    assert first.table["itself"]["cosine to teacher"].interval.value == pytest.approx(1, abs=1e-5)
    assert first.table["itself"]["neighbour overlap@10"].interval.value == 1
    assert first.speeds["teacher"]["parameters"] == teacher.parameter_count
    assert all(len(line) <= 120 for line in str(first).splitlines())


def test_queries_go_to_the_student_and_documents_to_the_teacher_in_their_roles(
    tmp_path: Path, prompted: Encoder, texts_task: Retrieval
) -> None:
    student = students.keep_layers(prompted, [0])
    scores = evaluate(
        {"student": student},
        prompted,
        EvaluationData(retrieval={"": texts_task}),
        store=tmp_path / "store",
        speed=False,
    )
    queries, documents = (
        student.encode(texts_task.queries, role="query"),
        prompted.encode(texts_task.corpus, role="document"),
    )
    expected = retrieval(queries, documents.half().float(), texts_task)["ndcg@10"].values
    assert torch.allclose(scores.table["student -> teacher's index"]["ndcg@10"].values, expected)
    stored = embed(texts_task.corpus, prompted, tmp_path / "store", role="document")
    assert len(stored) == 2 * len(tiny.SENTENCES)  # queries and documents, each under its prompt alone
    # A wrong role must show: the vectors of the other prompt differ.
    assert not torch.allclose(documents, prompted.encode(texts_task.corpus, role="query"), atol=1e-2)


def test_a_mixed_index_is_the_teachers_but_for_the_half_that_the_student_adds(
    tmp_path: Path, prompted: Encoder, texts_task: Retrieval
) -> None:
    student = students.keep_layers(prompted, [0])
    data, options = EvaluationData(retrieval={"": texts_task}), {"store": tmp_path / "store", "speed": False}
    scores = evaluate({"student": student, "other": prompted}, prompted, data, mixed_index=["student"], **options)
    by_teacher = prompted.encode(texts_task.corpus, role="document").half().float()
    by_student = student.encode(texts_task.corpus, role="document")
    new = [hashlib.blake2b(name.encode(), digest_size=1).digest()[0] % 2 for name in texts_task.corpus_ids]
    assert 3 <= sum(new) <= 9
    index = torch.stack([(by_student if added else by_teacher)[row] for row, added in enumerate(new)])
    queries = student.encode(texts_task.queries, role="query")
    expected = {name: score.values for name, score in retrieval(queries, index, texts_task).items()}
    found = scores.table["student -> mixed index"]
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[name].values, expected[name]) for name in expected)
    assert list(scores.table) == [
        "teacher",
        "student",
        "student -> teacher's index",
        "student -> mixed index",
        "other",
        "other -> teacher's index",
    ]
    # Neither of the two indexes that it is made of gives these numbers.
    for other in (by_teacher, by_student):
        assert not torch.allclose(retrieval(queries, other, texts_task)["ndcg@10"].values, expected["ndcg@10"])


def test_half_of_many_documents_are_new_by_their_ids_alone() -> None:
    ids = [f"doc-{number}" for number in range(4000)]
    old, new = torch.zeros(4000, 1), torch.ones(4000, 1)
    chosen = mixed_index(ids, old, new)
    assert float(chosen.mean()) == pytest.approx(0.5, abs=0.03)
    assert torch.equal(mixed_index(ids[::-1], old, new), chosen.flip(0))


def test_a_student_encodes_each_corpus_once(
    tmp_path: Path, tiny_bert: Path, texts_task: Retrieval, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = Encoder.from_pretrained(tiny_bert)
    student, calls = students.keep_layers(teacher, 2), []
    encode = student.encode

    def counted(texts: list[str], **options: Any) -> torch.Tensor:
        calls.append((len(texts), options["role"]))
        return encode(texts, **options)

    monkeypatch.setattr(student, "encode", counted)
    data = EvaluationData(retrieval={"docs": texts_task})
    evaluate({"student": student}, teacher, data, store=tmp_path / "store", mixed_index=["student"], speed=False)
    assert sorted(calls) == [(12, "document"), (12, "query")]


def test_evaluate_keeps_fidelity_in_full_beside_the_table(tmp_path: Path, tiny_bert: Path) -> None:
    teacher = Encoder.from_pretrained(tiny_bert)
    data = EvaluationData(texts=[*TEXTS, *TEXTS[:5]])  # one that comes twice would be its own neighbour
    scores = evaluate({"student": students.keep_layers(teacher, 3)}, teacher, data, store=tmp_path / "s", speed=False)
    whole, *parts = scores.slices["student"]
    assert whole.texts == 24
    lengths = teacher.tokenize(TEXTS).tokens.lengths
    assert {part.by for part in parts} == {"tokens", "margin"}
    assert [p for p in parts if p.by == "tokens"][-1].high == int(lengths.max())
    assert scores.as_json()["fidelity"]["student"][0]["texts"] == 24
    for name, score in scores.table["student"].items():
        assert score.interval == whole.scores[name].interval


def test_fidelity_reads_texts_in_the_role_it_is_given(tmp_path: Path, prompted: Encoder) -> None:
    data = EvaluationData(texts=tiny.SENTENCES, role="document")
    scores = evaluate({"student": prompted}, prompted, data, store=tmp_path / "store", speed=False)
    assert scores.table["student"]["cosine to teacher"].interval.value == pytest.approx(1, abs=1e-5)
    store = embed(tiny.SENTENCES, prompted, tmp_path / "store", role="document")
    assert len(store) == len(tiny.SENTENCES)


def test_a_text_is_read_once_in_each_role() -> None:
    read: list[str | None] = []

    def encode(texts: list[str], *, role: str | None = None) -> torch.Tensor:
        read.append(role)
        return torch.full((len(texts), 2), float(len(read)))

    once = _once(encode)
    assert [once(["a"], role=role)[0, 0] for role in ("query", "document", "query", None)] == [1, 2, 1, 3]
    assert read == ["query", "document", None]


def test_a_vector_that_is_not_finite_counts_as_nothing(
    tmp_path: Path, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = Encoder.from_pretrained(tiny_bert)
    compute = teacher.compute

    def broken(tokens: object) -> torch.Tensor:
        vectors = compute(tokens).clone()
        vectors[0] = torch.nan
        return vectors

    monkeypatch.setattr(teacher, "compute", broken)
    data = EvaluationData(texts=tiny.SENTENCES)
    scores = evaluate(
        {"student": students.keep_layers(teacher, 2)}, teacher, data, store=tmp_path / "store", speed=False
    )
    assert all(math.isfinite(score.interval.value) for score in scores.table["student"].values())


def test_a_slow_model_is_measured_on_few_texts_of_all_lengths(tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = Encoder.from_pretrained(tiny_bert), []

    def slow(texts: list[str]) -> None:
        seen.extend(texts)
        time.sleep(0.02 * len(texts))

    monkeypatch.setattr(model, "encode", slow)
    texts = ["x" * (length * length) for length in torch.randperm(200).tolist()]
    found = speeds({"slow": model}, texts, seconds=0.1)["slow"]
    assert 0 < found["texts_per_second"] <= 50
    assert len(seen) == 1 + FIRST
    mean = sum(map(len, texts)) / 200
    assert sum(map(len, seen[1:])) / FIRST == pytest.approx(mean, rel=0.15)


def test_nothing_to_measure_is_an_empty_table(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    teacher = Encoder.from_pretrained(tiny_model("bert", layers=2))
    scores = evaluate({"student": teacher}, teacher, EvaluationData(), store=tmp_path / "store")
    assert scores.table == {"teacher": {}, "student": {}}
    assert scores.speeds == {}


def test_texts_are_listed_by_the_role_they_are_read_in() -> None:
    task = Retrieval(corpus_ids=["1", "2"], corpus=["a", "c"], query_ids=["1"], queries=["q"], qrels={"1": {"1": 1}})
    pairs = Pairs(sentence1=["a", "b"], sentence2=["b", "c"], score=[1.0, 2.0])
    data = EvaluationData(texts=["a", "b", "a"], role="document", pairs={"": pairs}, retrieval={"": task})
    assert data.by_role() == {"document": ["a", "b", "c"], None: ["a", "b", "c"], "query": ["q"]}
    assert EvaluationData().by_role() == {None: []}
