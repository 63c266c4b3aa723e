"""The folder that is handed over: opened by sentence-transformers, described by a valid card, replaced whole."""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from huggingface_hub import ModelCard

import distill
from distill import export, students
from distill.encoder import Encoder
from distill.evaluation import Score, Scores
from distill.export import Provenance
from distill.metrics import Interval

TEXTS = [*tiny.SENTENCES, "", "word " * 200, "MIXED Case, and an unknown: ŵ"]
MODULES = {
    "static": ["StaticEmbedding", "Dense", "Normalize"],
    "layers": ["Transformer", "Pooling", "Normalize"],
    "projected": ["Transformer", "Pooling", "Dense", "Normalize"],
}
BUILD: dict[str, Callable[[Encoder], Encoder]] = {
    "static": lambda teacher: students.static(teacher, width=8),
    "layers": lambda teacher: students.keep_layers(teacher, 3),
    "projected": lambda teacher: students.keep_layers(teacher, 3, projection=True),
}


@pytest.fixture
def teacher(tiny_mpnet: Path) -> Encoder:
    return Encoder.from_pretrained(tiny_mpnet)


@pytest.fixture
def provenance(teacher: Encoder) -> Provenance:
    return Provenance(
        teacher=teacher, data="three texts", loss="CosineDistance()", command="python recipes/mine.py --x 1"
    )


def scores() -> Scores:
    half = Score(Interval(value=0.5, low=0.4, high=0.6))
    undefined = Score(Interval(value=math.nan, low=math.nan, high=math.nan))
    row = {"ndcg@10": half, "similarity spearman": undefined}
    speed = {"parameters": 2_500_000, "bytes": 1e7, "texts_per_second": 1234.5}
    return Scores({"teacher": row, "student": row}, {"student": speed})


@pytest.mark.parametrize("kind", list(BUILD))
def test_sentence_transformers_opens_the_folder_and_gives_the_same_vectors(
    kind: str, teacher: Encoder, provenance: Provenance, tmp_path: Path
) -> None:
    from sentence_transformers import SentenceTransformer

    student = BUILD[kind](teacher)
    path = export.export(student, tmp_path / "student", provenance=provenance, scores=scores())
    opened = SentenceTransformer(str(path), device="cpu")
    assert [type(module).__name__ for module in opened] == MODULES[kind]
    texts = [text for text in TEXTS if text or kind != "static"]
    theirs = opened.encode(texts, convert_to_tensor=True)
    assert (theirs - student.encode(texts)).abs().max() <= 1e-5
    assert (Encoder.from_pretrained(path).encode(texts) - student.encode(texts)).abs().max() <= 1e-5


def test_the_card_is_valid_and_says_where_the_student_comes_from(
    teacher: Encoder, provenance: Provenance, tmp_path: Path
) -> None:
    teacher.name, teacher.commit = "sentence-transformers/some-teacher", "0123456789abcdef0123456789abcdef01234567"
    path = export.export(BUILD["layers"](teacher), tmp_path / "student", provenance=provenance, scores=scores())
    card = ModelCard.load(path / "README.md")
    assert card.data.library_name == "sentence-transformers"
    assert card.data.pipeline_tag == "sentence-similarity"
    assert card.data.base_model == "sentence-transformers/some-teacher"
    [result] = card.data.eval_results  # the undefined score is not among them: YAML's .nan is refused by the Hub
    assert (result.metric_type, result.metric_value) == ("ndcg@10", 0.5)
    for part in (
        teacher.name,
        teacher.commit,
        "three texts",
        "CosineDistance()",
        "python recipes/mine.py --x 1",
        "0.500",
    ):
        assert part in card.text
    assert "SentenceTransformer(" in card.text


def test_a_card_without_scores_and_with_a_local_teacher_is_valid(
    teacher: Encoder, provenance: Provenance, tmp_path: Path
) -> None:
    path = export.export(BUILD["layers"](teacher), tmp_path / "student", provenance=provenance, license="mit")
    card = ModelCard.load(path / "README.md")
    assert (card.data.base_model, card.data.eval_results, card.data.license) == (None, None, "mit")


def test_provenance_is_strict_json(teacher: Encoder, provenance: Provenance, tmp_path: Path) -> None:
    path = export.export(BUILD["static"](teacher), tmp_path / "student", provenance=provenance, scores=scores())

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    record = json.loads((path / "distill.json").read_text(), parse_constant=refuse)
    assert record["teacher"] == teacher.name
    assert record["teacher_fingerprint"] == teacher.fingerprint()
    assert record["versions"]["distill"] == distill.__version__
    assert record["scores"]["student"]["ndcg@10"] == {"value": 0.5, "low": 0.4, "high": 0.6}
    assert record["scores"]["student"]["similarity spearman"]["value"] is None


def test_an_export_replaces_an_earlier_one_whole(teacher: Encoder, provenance: Provenance, tmp_path: Path) -> None:
    path = tmp_path / "student"
    export.export(BUILD["projected"](teacher), path, provenance=provenance)
    (path / "left-over.txt").write_text("of the earlier one")
    export.export(BUILD["static"](teacher), path, provenance=provenance)
    assert not (path / "left-over.txt").exists()
    assert sorted(item.name for item in path.iterdir() if item.is_dir()) == ["1_Dense", "2_Normalize"]
    assert [item.name for item in tmp_path.iterdir()] == ["student"]


def test_an_export_that_fails_leaves_the_earlier_one(
    teacher: Encoder, provenance: Provenance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = export.export(BUILD["static"](teacher), tmp_path / "student", provenance=provenance)
    before = {item.name: item.read_bytes() for item in path.rglob("*") if item.is_file()}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "_card", full)
    with pytest.raises(OSError, match="No space"):
        export.export(BUILD["layers"](teacher), path, provenance=provenance)
    assert {item.name: item.read_bytes() for item in path.rglob("*") if item.is_file()} == before
    assert [item.name for item in tmp_path.iterdir()] == ["student"]


def test_this_command_can_be_typed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["recipes/x.py", "--data", "two words.txt"])
    assert export.this_command() == "python recipes/x.py --data 'two words.txt'"
    monkeypatch.setattr(export.distributed, "world_size", lambda: 4)
    assert export.this_command().startswith("torchrun --nproc-per-node 4 recipes/x.py")


def test_usage_is_three_lines_that_run(teacher: Encoder, provenance: Provenance, tmp_path: Path) -> None:
    path = export.export(BUILD["static"](teacher), tmp_path / "student", provenance=provenance)
    names: dict[str, object] = {}
    exec(compile(export.usage(path), "usage", "exec"), names)
    assert isinstance(names["student"], object)
    assert torch.as_tensor(names["vectors"]).shape == (1, teacher.width)
