"""Vectors in fewer bytes: bit for bit sentence-transformers', and what is left of neighbours and rankings."""

import json
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import runs
import torch
from sentence_transformers.util import quantize_embeddings

from distill.config import EvaluationConfig
from distill.data import Pairs, Retrieval
from distill.encoder import Encoder
from distill.evaluation import EvaluationData, Precision, Scores, evaluate, quantize, restore
from distill.evaluation.precisions import stored_scores, value_ranges
from distill.evaluation.scores import Stored, mean_score
from distill.metrics import neighbour_overlap
from distill.similarity import normalize

PRECISIONS = get_args(Precision)


def vectors(count: int = 200, width: int = 20) -> torch.Tensor:
    return normalize(torch.randn(count, width) * torch.linspace(0.2, 3, width) + torch.linspace(-1, 1, width))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("width", [16, 20])
def test_the_bytes_are_those_of_sentence_transformers(precision: Precision, width: int) -> None:
    these, others = vectors(width=width), vectors(300, width)
    expected = quantize_embeddings(these, precision)
    found = quantize(these, precision)
    assert (found.dtype, found.tobytes()) == (expected.dtype, expected.tobytes())
    ranges = value_ranges(others)  # some of `these` lie outside, and are put at the ends
    expected = quantize_embeddings(these, precision, ranges=ranges.numpy())
    assert quantize(these, precision, ranges).tobytes() == expected.tobytes()
    assert quantize(these, precision, ranges).tobytes() == (
        quantize_embeddings(these, precision, calibration_embeddings=others.numpy()).tobytes()
    )


def test_a_number_that_never_changes_has_no_step() -> None:
    these = vectors()
    these[:, 3] = 0.25
    assert quantize(these, "int8").tobytes() == quantize_embeddings(these, "int8").tobytes()
    assert (restore(quantize(these, "int8"), "int8", 20, value_ranges(these))[:, 3] - 0.25).abs().max() <= 0.5


@pytest.mark.parametrize("precision", ["int8", "uint8"])
def test_what_comes_back_is_within_half_a_step(precision: Precision) -> None:
    these = vectors()
    ranges = value_ranges(these)
    back = restore(quantize(these, precision, ranges), precision, 20, ranges)
    step = (ranges[1] - ranges[0]) / 255
    assert ((back - these).abs() <= 0.5001 * step + 1e-6)[these < ranges[1]].all()


@pytest.mark.parametrize("precision", ["binary", "ubinary"])
def test_cosines_of_signs_fall_with_the_hamming_distance(precision: Precision) -> None:
    these = vectors(50)
    signs = restore(quantize(these, precision), precision, 20)
    assert torch.equal(signs, torch.where(these > 0, 1.0, -1.0))
    hamming = (signs[:1] != signs).sum(dim=1)
    assert torch.allclose((normalize(signs[:1]) @ normalize(signs).T)[0], 1 - 2 * hamming / 20, atol=1e-6)


def test_an_unknown_precision_is_refused(unchecked: None) -> None:
    with pytest.raises(ValueError, match="float32, int8, uint8, binary, ubinary"):
        quantize(vectors(), "int4")  # type: ignore[arg-type]


def test_each_precision_is_measured_against_the_models_own_vectors(tiny_bert: Path, tmp_path: Path) -> None:
    teacher = Encoder.from_pretrained(tiny_bert)
    texts = runs.texts(40)
    ids = [str(number) for number in range(40)]
    queries, grades = [f"{text} again" for text in texts[:8]], {i: {i: 1} for i in ids[:8]}
    task = Retrieval(corpus_ids=ids, corpus=texts, query_ids=ids[:8], queries=queries, qrels=grades)
    data = EvaluationData(texts=texts, retrieval={"mine": task}, precisions=("int8", "binary"))
    student = runs.student("static", teacher)
    scores = evaluate({"student": student}, teacher, data, store=tmp_path / "store", speed=False)
    forms = ["float32", "int8", "int8 raw", "binary"]
    assert [(one.system, one.form) for one in scores.stored] == [(s, f) for s in ("teacher", "student") for f in forms]
    assert [one.bytes for one in scores.stored] == [128, 32, 32, 4] * 2
    whole, int8, raw, binary = (one.scores["overlap@10 with float32"].interval.value for one in scores.stored[4:])
    mine = student.encode(texts)
    assert whole == 1.0
    assert binary == pytest.approx(float(neighbour_overlap(torch.sign(mine), mine, 10).mean()))
    assert binary < raw <= int8 <= whole, "fewer bits, fewer neighbours; the ranges bring some back"
    assert scores.stored[4].scores["mine ndcg@10"].interval == scores.table["student"]["mine ndcg@10"].interval
    report = json.loads(json.dumps(scores.as_json()))["precisions"]["student"]
    assert report["binary"]["bytes"] == 4
    assert report["binary"]["kept"]["overlap@10 with float32"] == pytest.approx(binary)
    table = scores.stored_table()
    assert all(word in table for word in ("teacher", "student", *forms, "128", f"{binary:.3f}", f"{binary:.1%}"))


@pytest.mark.parametrize(("count", "measured"), [(1, False), (20, False), (21, True)])
def test_few_texts_have_no_overlap_and_a_vector_has_its_bytes(
    tiny_bert: Path, tmp_path: Path, count: int, measured: bool
) -> None:
    teacher, texts = Encoder.from_pretrained(tiny_bert), runs.texts(count)
    data = EvaluationData(texts=[*texts, *texts], precisions=("int8", "binary"))
    found = evaluate({}, teacher, data, store=tmp_path / "store", speed=False).stored
    assert [one.bytes for one in found] == [128, 32, 32, 4]
    assert [list(one.scores) for one in found] == [["overlap@10 with float32"] if measured else []] * 4


def test_queries_are_placed_in_the_ranges_of_the_documents() -> None:
    """One query has no range of its own; it would be off by half a step of 1."""
    documents, ids = torch.randn(30, 16) / 16, [str(number) for number in range(30)]
    given = {"document": documents, "query": documents[7:8]}
    task = Retrieval(corpus_ids=ids, corpus=ids, query_ids=["q"], queries=["q"], qrels={"q": {"7": 1}})
    found = stored_scores("a", lambda texts, role: given[role], ["int8", "uint8"], [], None, {"": task})
    assert [one.scores["ndcg@10"].interval.value for one in found if "raw" not in one.form] == [1.0] * 3


def test_what_is_kept_is_kept_of_the_same_systems_float32() -> None:
    values = {("teacher", "float32"): 0.8, ("student", "float32"): 0.5, ("student", "binary"): 0.25}
    stored = [
        Stored(system=system, form=form, bytes=1, scores={"ndcg@10": mean_score(torch.full((3,), value))})
        for (system, form), value in values.items()
    ]
    scores = Scores({}, {}, stored=stored)
    assert [scores.kept_of_float32(one) for one in stored] == [{"ndcg@10": share} for share in (1.0, 1.0, 0.5)]


def test_the_bytes_of_a_vector_are_known_without_texts_or_documents(tiny_bert: Path, tmp_path: Path) -> None:
    teacher, pairs = (
        Encoder.from_pretrained(tiny_bert),
        Pairs(sentence1=["a", "b"], sentence2=["c", "d"], score=[0.0, 1.0]),
    )
    data = EvaluationData(pairs={"sts": pairs}, precisions=("int8",))
    found = evaluate({}, teacher, data, store=tmp_path / "store", speed=False).stored
    assert [one.bytes for one in found] == [128, 32, 32]
    assert evaluate({}, teacher, EvaluationData(precisions=("int8",)), store=tmp_path / "store").stored == []


def test_nothing_is_measured_that_was_not_asked_for(tiny_bert: Path, tmp_path: Path) -> None:
    teacher = Encoder.from_pretrained(tiny_bert)
    data = EvaluationConfig().load(runs.texts(12))
    assert evaluate({}, teacher, data, store=tmp_path / "store", speed=False).stored == []
    assert EvaluationConfig(precisions=("int8",)).load([]).precisions == ("int8",)


def test_types_are_those_of_an_index() -> None:
    assert [quantize(vectors(), precision).dtype for precision in PRECISIONS] == [
        np.float32, np.int8, np.uint8, np.int8, np.uint8,
    ]  # fmt: skip
