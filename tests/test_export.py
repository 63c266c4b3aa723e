"""The folder that is handed over: opened by sentence-transformers, described by a valid card, replaced whole."""

import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from huggingface_hub import ModelCard, metadata_load
from huggingface_hub.repocard_data import eval_results_to_model_index

import distill
from distill import distributed, export, students
from distill.encoder import Encoder
from distill.evaluation import Score, Scores
from distill.export import Provenance, writing
from distill.export.card import with_section
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
    assert (result.metric_type, result.metric_value) == ("cosine_ndcg@10", 0.5)
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


@pytest.mark.parametrize("kind", list(BUILD))
def test_the_card_says_what_skips_the_dense_layer_of_a_static_student(
    kind: str, teacher: Encoder, provenance: Provenance, tmp_path: Path
) -> None:
    path = export.export(BUILD[kind](teacher), tmp_path / "student", provenance=provenance)
    assert ("model2vec's `StaticModel`" in (path / "README.md").read_text()) == (kind == "static")


def test_a_card_without_scores_and_with_a_local_teacher_is_valid(
    teacher: Encoder, provenance: Provenance, tmp_path: Path
) -> None:
    path = export.export(BUILD["layers"](teacher), tmp_path / "student", provenance=provenance, license="mit")
    card = ModelCard.load(path / "README.md")
    assert (card.data.base_model, card.data.eval_results, card.data.license) == (None, None, "mit")


def test_the_results_on_the_card_name_task_and_data(teacher: Encoder, provenance: Provenance, tmp_path: Path) -> None:
    names = ["sts-dev spearman", "cacm docs ndcg@10", "cacm docs recall@10", "intents accuracy"]
    names += ["cosine to teacher", "neighbour overlap@10", "similarity spearman"]
    row = {name: Score(Interval(value=n / 10, low=0.0, high=1.0)) for n, name in enumerate(names, 1)}
    index = {"cacm docs ndcg@10": Score(Interval(value=0.12345, low=0.1, high=0.2))}
    table = {"teacher": {}, "untrained start": row, "student": row, "student -> teacher's index": index}
    path = export.export(
        BUILD["layers"](teacher), tmp_path / "student", provenance=provenance, scores=Scores(table, {})
    )
    [model] = metadata_load(path / "README.md")["model-index"]
    found = {
        (result["task"]["type"], result["dataset"]["name"], metric["type"], metric["value"])
        for result in model["results"]
        for metric in result["metrics"]
    }
    assert found == {
        ("semantic-similarity", "sts-dev", "spearman_cosine", 0.1),
        ("information-retrieval", "cacm docs", "cosine_ndcg@10", 0.2),
        ("information-retrieval", "cacm docs", "cosine_recall@10", 0.3),
        ("information-retrieval", "cacm docs, teacher's index", "cosine_ndcg@10", 0.1235),
        ("text-classification", "intents", "accuracy", 0.4),
        ("knowledge-distillation", "held-out texts", "cosine_to_teacher", 0.5),
        ("knowledge-distillation", "held-out texts", "neighbour_overlap@10", 0.6),
        ("knowledge-distillation", "held-out texts", "similarity_spearman", 0.7),
    }
    results = ModelCard.load(path / "README.md").data.eval_results
    assert eval_results_to_model_index(model["name"], results) == [model]


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        ({"license": "apache-2.0"}, {"license": "apache-2.0"}),
        ({"license": "other", "license_name": "own", "license_link": "LICENSE"}, None),
        ({"tags": ["x"]}, {}),
        (None, {}),
    ],
)
def test_the_teachers_licence_is_passed_through(
    tiny_mpnet: Path, tmp_path: Path, head: dict[str, str] | None, expected: dict[str, str] | None
) -> None:
    folder = Path(shutil.copytree(tiny_mpnet, tmp_path / "teacher"))
    if head is not None:
        (folder / "README.md").write_text(f"---\n{json.dumps(head)}\n---\n\n# a teacher\n")
    teacher = Encoder.from_pretrained(folder)
    made = Provenance(teacher=teacher, data="texts", loss="loss", command="")
    path = export.export(BUILD["static"](teacher), tmp_path / "student", provenance=made)
    found = metadata_load(path / "README.md")
    fields = ("license", "license_name", "license_link")
    assert {field: found[field] for field in fields if field in found} == (head if expected is None else expected)
    path = export.export(BUILD["static"](teacher), tmp_path / "student", provenance=made, license="mit")
    assert metadata_load(path / "README.md")["license"] == "mit"


def test_a_section_is_added_once_before_how_it_was_made() -> None:
    card = "---\ntags: [x]\n---\n\n# s\n\n## Use\n\nso\n\n## How it was made\n\n- by hand\n"
    once = with_section(card, "ONNX", "one")
    assert once == card.replace("## How", "## ONNX\n\none\n\n## How")
    assert with_section(once, "ONNX", "two") == once.replace("one", "two")
    assert with_section("# s\n", "ONNX", "one") == "# s\n\n## ONNX\n\none\n"
    assert with_section(with_section("# s\n", "ONNX", "one"), "ONNX", "two") == "# s\n\n## ONNX\n\ntwo\n"


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

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing, "model_card", full)
    with pytest.raises(OSError, match="No space"):
        export.export(BUILD["layers"](teacher), path, provenance=provenance)
    assert {item.name: item.read_bytes() for item in path.rglob("*") if item.is_file()} == before
    assert [item.name for item in tmp_path.iterdir()] == ["student"]


def test_this_command_can_be_typed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["recipes/x.py", "--data", "two words.txt"])
    assert export.this_command() == "python recipes/x.py --data 'two words.txt'"
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    assert export.this_command().startswith("torchrun --nproc-per-node 4 recipes/x.py")


@pytest.mark.parametrize("prompts", [{"query": "query: ", "document": "passage: "}, {"query": "query: "}])
def test_usage_gives_each_role_its_prompt(
    teacher: Encoder, provenance: Provenance, tmp_path: Path, prompts: dict[str, str]
) -> None:
    student = BUILD["static"](teacher)
    student.prompts = prompts
    path = export.export(student, tmp_path / "student", provenance=provenance)
    code, names = export.usage(path), dict[str, Any]()
    assert code in (path / "README.md").read_text()
    exec(compile(code, "usage", "exec"), names)
    query, document = student.encode(["a query for the index you already have"], role="query"), ["a document to add"]
    assert (torch.as_tensor(names["vectors"]) - query).abs().max() <= 1e-5
    assert (query - student.encode(["a query for the index you already have"])).abs().max() > 1e-3
    assert (torch.as_tensor(names["added"]) - student.encode(document, role="document")).abs().max() <= 1e-5


def test_usage_is_three_lines_that_run(teacher: Encoder, provenance: Provenance, tmp_path: Path) -> None:
    path = export.export(BUILD["static"](teacher), tmp_path / "student", provenance=provenance)
    names: dict[str, object] = {}
    exec(compile(export.usage(path), "usage", "exec"), names)
    assert isinstance(names["student"], object)
    assert torch.as_tensor(names["vectors"]).shape == (1, teacher.width)
