"""A narrower space: directions that lose least, an index turned once, and a student that finds in it what it should."""

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
import tiny
import torch

from distill import export, narrow, students
from distill.config import StudentConfig
from distill.embed import embed, embed_vocabulary, import_vectors
from distill.encoder import Encoder
from distill.errors import DataError, IntegrityError, RecipeError
from distill.losses import CosineDistance
from distill.modules import Truncate
from distill.similarity import cosine_similarity_matrix, normalize, pairwise_cosine
from distill.space import Space
from distill.store import Store
from distill.training import TrainConfig, match, train

TEXTS = runs.texts(120)
RECIPES = Path(__file__).resolve().parents[1] / "recipes"


@pytest.fixture
def teacher(tiny_mpnet: Path) -> Encoder:
    return Encoder.from_pretrained(tiny_mpnet)


@pytest.fixture
def store(teacher: Encoder, tmp_path: Path) -> Store:
    return embed(TEXTS, teacher, tmp_path / "store")


def gram_error(vectors: torch.Tensor, directions: torch.Tensor) -> float:
    inside = vectors @ directions.T
    return float((vectors @ vectors.T - inside @ inside.T).square().sum())


# Directions


def test_principal_directions_of_batches_are_those_of_all_rows_about_zero() -> None:
    rows = torch.randn(200, 12) @ torch.diag(torch.logspace(0, -1.5, 12)) + 0.5
    found = narrow.principal(rows.split(17))
    _, _, expected = torch.linalg.svd(normalize(rows).double(), full_matrices=False)
    assert (found.double() @ expected.T).abs().diagonal().min() > 1 - 1e-5
    torch.testing.assert_close(found @ found.T, torch.eye(12), rtol=0, atol=1e-5)
    assert torch.equal(found, narrow.principal(rows.split(17)))


def test_the_first_directions_lose_least_of_all_dot_products() -> None:
    rows = normalize(torch.randn(100, 10) @ torch.diag(torch.linspace(2, 0.2, 10)) + 0.3)
    best = gram_error(rows, narrow.principal([rows])[:4])
    centred = narrow.principal([rows - rows.mean(dim=0)])[:4]
    assert best < gram_error(rows, centred)
    for seed in range(5):
        torch.manual_seed(seed)
        other = torch.linalg.qr(torch.randn(10, 4))[0].T
        assert best < gram_error(rows, other)


def test_no_rows_have_no_directions() -> None:
    with pytest.raises(DataError, match="no directions"):
        narrow.principal([])


def test_all_directions_keep_every_cosine_and_few_keep_what_they_say() -> None:
    rows = torch.randn(60, 8)
    directions = narrow.principal([rows])
    whole, few = narrow.keeps(rows, directions), narrow.keeps(rows, directions[:3])
    assert (whole.squared_length, whole.overlap) == (pytest.approx(1), 1)
    assert whole.cosine_error < 1e-6
    inside = normalize(normalize(rows) @ directions[:3].T)
    apart = (cosine_similarity_matrix(rows, rows) - inside @ inside.T).abs()
    assert few.cosine_error == pytest.approx(float(apart.sum() / (60 * 59)), rel=1e-4)
    assert few.squared_length == pytest.approx(
        float((normalize(rows) @ directions[:3].T).square().sum() / 60), rel=1e-5
    )
    assert 0 < few.overlap < 1
    assert str(few).startswith("3 of 8 directions keep ")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_vectors_of_another_dtype_are_turned(dtype: torch.dtype) -> None:
    vectors, directions = torch.randn(5, 8).to(dtype), torch.eye(3, 8)
    turned = narrow.turn(vectors, directions)
    assert turned.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(turned, narrow.turn(vectors.double(), directions.double()).to(turned.dtype))


# The teacher and its store


def test_the_narrow_teacher_gives_the_turned_vectors_and_its_store_holds_them(teacher: Encoder, store: Store) -> None:
    before = teacher.fingerprint()
    space = narrow.narrow(teacher, store, TEXTS, 12)
    assert space.teacher.width == space.store.width == 12
    assert space.directions is not None
    expected = narrow.turn(teacher.encode(TEXTS), space.directions)
    assert pairwise_cosine(space.teacher.encode(TEXTS), expected).min() > 1 - 1e-6
    assert (space.store.vectors(TEXTS) - expected).abs().max() < 2e-3  # float16, twice
    assert space.store.fingerprint == space.teacher.fingerprint() != before
    assert teacher.fingerprint() == before
    assert space.teacher.name == teacher.name


def test_a_teacher_that_cuts_its_vectors_is_turned_as_it_gives_them(teacher: Encoder) -> None:
    teacher.head.append(Truncate(24))
    vectors = teacher.encode(TEXTS)
    directions = narrow.principal([vectors])[:8]
    found = narrow.narrow_teacher(teacher, directions).encode(TEXTS)
    assert pairwise_cosine(found, narrow.turn(vectors, directions)).min() > 1 - 1e-6


def test_directions_are_fixed_by_the_first_use_and_nested(teacher: Encoder, store: Store) -> None:
    wide, thin = (narrow.narrow(teacher, store, TEXTS[:60], width) for width in (16, 4))
    other = narrow.narrow(teacher, store, TEXTS[60:], 16)
    assert wide.directions is not None
    assert thin.directions is not None
    assert other.directions is not None
    assert torch.equal(wide.directions, other.directions)
    assert torch.equal(wide.directions[:4], thin.directions)
    assert other.kept != wide.kept, "what is kept is measured on the texts at hand"


def test_every_row_is_turned_once_and_a_cut_off_job_goes_on(
    teacher: Encoder, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed_vocabulary(teacher, store.path)
    store = Store.open(store.path)
    monkeypatch.setattr(narrow, "SHARD_ROWS", 50)
    turned: list[int] = []
    append = Store.append

    def counted(self: Store, rows: Any) -> Any:
        if len(turned) == 2:
            turned.append(0)
            raise KeyboardInterrupt
        turned.append(len(rows.keys))
        return append(self, rows)

    monkeypatch.setattr(Store, "append", counted)
    with pytest.raises(KeyboardInterrupt):
        narrow.narrow(teacher, store, TEXTS, 8)
    left = narrow.narrow_path(store.path, 8) / "rows-000000000000000000000000.safetensors"
    left.write_text("half")
    space = narrow.narrow(teacher, store, TEXTS, 8)
    assert not left.exists()
    assert len(space.store) == len(store) == sum(turned)
    assert len(store) > len(TEXTS)
    narrow.narrow(teacher, store, TEXTS, 8)
    assert len(store) == sum(turned)
    tokens = embed_vocabulary(space.teacher, space.store.path)
    assert len(space.store) == len(Store.open(space.store.path)), "tokens are turned with the texts"
    assert tokens.shape == (len(teacher.tokenizer), 8)


def test_rows_that_were_set_aside_stay_so(teacher: Encoder, tmp_path: Path) -> None:
    store = embed([*TEXTS, ""], teacher, tmp_path / "store")
    space = narrow.narrow(teacher, store, TEXTS, 8)
    assert (space.store.flags != 0).sum() == (store.flags != 0).sum() == 1


def test_a_vector_that_is_not_finite_has_no_say_in_the_directions(teacher: Encoder, tmp_path: Path) -> None:
    vectors = teacher.encode(TEXTS).numpy()
    vectors[3] = np.nan
    store = import_vectors(TEXTS, vectors, teacher, tmp_path)
    found = narrow.narrow(teacher, store, TEXTS, 8).directions
    assert found is not None
    rest = narrow.principal([torch.from_numpy(np.delete(vectors, 3, axis=0))])
    assert (found @ rest[:8].T).abs().diagonal().min() > 0.999


def test_texts_are_read_with_the_prompt_of_their_role(tmp_path: Path) -> None:
    teacher = Encoder.from_pretrained(tiny.bert(tmp_path / "prompted", layers=2, prompts={"query": "the snow: "}))
    texts = {"query": TEXTS[:50], "document": TEXTS[50:]}
    for role, some in texts.items():
        store = embed(some, teacher, tmp_path / "store", role=role)
    space = narrow.narrow(teacher, store, texts, 8)
    assert space.teacher.prompt("query") == "the snow: "
    assert space.directions is not None
    rows = torch.cat([teacher.encode(some, role=role) for role, some in texts.items()])
    assert (narrow.principal([rows])[:8] @ space.directions.T).abs().diagonal().min() > 0.99


@pytest.mark.parametrize("width", [0, 32, 40])
def test_a_space_that_is_not_narrower_is_refused(teacher: Encoder, store: Store, width: int) -> None:
    with pytest.raises(RecipeError, match=rf"has 1\.\.31 directions, got {width}"):
        narrow.narrow(teacher, store, TEXTS, width)


def test_few_texts_have_few_directions(teacher: Encoder, store: Store) -> None:
    assert narrow.narrow(teacher, store, TEXTS[:9], 9).store.width == 9
    with pytest.raises(RecipeError, match="holds the 9 directions of as many texts, got a width of 10"):
        narrow.narrow(teacher, store, TEXTS, 10)


def test_directions_of_another_teacher_or_damaged_ones_are_refused(tmp_path: Path) -> None:
    path = tmp_path / narrow.NAME
    narrow.write_directions(path, torch.linalg.qr(torch.randn(8, 8))[0])
    assert torch.equal(narrow.read_directions(tmp_path), narrow.read_directions(path, 8))
    with pytest.raises(IntegrityError, match=r"holds \(8, 8\), expected orthonormal rows of width 9"):
        narrow.read_directions(path, 9)
    narrow.write_directions(path, torch.randn(8, 8))
    with pytest.raises(IntegrityError, match="orthonormal"):
        narrow.read_directions(path)
    path.write_bytes(b"nothing")
    with pytest.raises(IntegrityError, match="is damaged"):
        narrow.read_directions(path)
    with pytest.raises(DataError, match=r"--student\.space"):
        narrow.read_directions(tmp_path / "absent")


# A student in it, and an index turned to it


@pytest.mark.parametrize("kind", ["static", "layers", "pretrained"])
def test_each_kind_of_student_lives_in_the_narrow_space(
    teacher: Encoder, store: Store, kind: str, tiny_bert_cls: Path
) -> None:
    options: dict[str, Any] = {"kind": kind, "space": 12}
    config = StudentConfig(**options | ({"name": str(tiny_bert_cls)} if kind == "pretrained" else {}))
    space = config.enter(teacher, store, TEXTS)
    student = config.build(space.teacher, space.store, TEXTS)
    assert student.width == 12
    assert pairwise_cosine(student.encode(TEXTS), space.store.vectors(TEXTS)).mean() > 0.05


def test_without_a_flag_the_space_is_the_teachers_own(teacher: Encoder, store: Store) -> None:
    space = StudentConfig().enter(teacher, store, TEXTS)
    assert (space.teacher, space.store, space.directions, space.as_json()) == (teacher, store, None, None)
    with pytest.raises(RecipeError, match=r"StudentConfig\.enter"):
        StudentConfig(space=12).build(teacher, store, TEXTS)


def test_a_trained_narrow_student_finds_its_texts_in_the_turned_index(
    teacher: Encoder, store: Store, tmp_path: Path
) -> None:
    config = StudentConfig(space=12, width=12)
    space = config.enter(teacher, store, TEXTS)
    student = config.build(space.teacher, space.store, TEXTS)
    found_before = found(student, space)
    data = match(TEXTS, student, space.teacher, space.store)
    run = train(
        student,
        data,
        space.store,
        CosineDistance(),
        TrainConfig(batch_size=40, epochs=40.0, learning_rate=2e-2),
        output=tmp_path / "run",
    )
    found_after = found(run.student, space)
    assert found_after > max(0.2, 5 * found_before)
    provenance = export.Provenance(
        teacher=space.teacher, data="texts", loss="CosineDistance()", command="x", space=space
    )
    path = export.export(run.student, tmp_path / "student", provenance=provenance)
    np.save(tmp_path / "index.npy", teacher.encode(TEXTS).numpy())
    arguments = [str(path), "--vectors", str(tmp_path / "index.npy"), "--output", str(tmp_path / "narrow.npy")]
    assert narrow.main(arguments) == 0
    index = torch.from_numpy(np.load(tmp_path / "narrow.npy"))
    assert index.dtype == torch.float32
    assert (index - space.store.vectors(TEXTS)).abs().max() < 2e-3
    queries = Encoder.from_pretrained(path).encode(TEXTS)
    in_index = float(((queries @ index.T).argmax(dim=1) == torch.arange(len(TEXTS))).float().mean())
    assert in_index == pytest.approx(found_after, abs=0.02)


def found(student: Encoder, space: Space) -> float:
    """The share of texts whose own vector is the nearest in the turned index."""
    scores = student.encode(TEXTS) @ space.store.vectors(TEXTS).T
    return float((scores.argmax(dim=1) == torch.arange(len(TEXTS))).float().mean())


def test_the_card_says_that_the_index_is_to_be_turned(teacher: Encoder, store: Store, tmp_path: Path) -> None:
    space = narrow.narrow(teacher, store, TEXTS, 8)
    provenance = export.Provenance(teacher=space.teacher, data="texts", loss="x", command="x", space=space)
    path = export.export(students.static(space.teacher, width=8), tmp_path / "student", provenance=provenance)
    card, record = (path / "README.md").read_text(), json.loads((path / "distill.json").read_text())
    assert str(space.kept) in card
    assert "python -m distill.narrow" in card
    assert "own vector space" not in card
    assert record["space"] == space.as_json()
    assert torch.equal(narrow.read_directions(path), space.directions)
    whole = export.Provenance(teacher=teacher, data="texts", loss="x", command="x")
    plain = export.export(students.static(teacher, width=8), tmp_path / "plain", provenance=whole)
    assert not (plain / narrow.NAME).exists()
    assert "own vector space" in (plain / "README.md").read_text()


def test_the_parts_that_are_the_teachers_keep_their_modes(tiny_bert: Path) -> None:
    teacher = Encoder.from_pretrained(tiny_bert).train()
    teacher.backbone.model.embeddings.eval()
    modes = [part.training for part in teacher.modules()]
    cut = narrow.narrow_teacher(teacher, torch.eye(teacher.width)[:3])
    assert [part.training for part in teacher.modules()] == modes
    assert all(part.training for part in (cut, cut.head, *cut.head))
    teacher.eval()
    assert not any(part.training for part in narrow.narrow_teacher(teacher, torch.eye(teacher.width)[:3]).modules())


def test_an_index_of_another_width_or_kind_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    narrow.write_directions(tmp_path / narrow.NAME, torch.eye(8)[:3])
    for array in (np.zeros((4, 7), np.float32), np.zeros((4, 8), np.int64), np.zeros(8, np.float32)):
        np.save(tmp_path / "index.npy", array)
        arguments = [str(tmp_path), "--vectors", str(tmp_path / "index.npy"), "--output", str(tmp_path / "out.npy")]
        assert narrow.main(arguments) == DataError.exit_code
        expected = "expected (rows, 8)" if array.dtype == np.float32 else "no floating point array"
        assert expected in capsys.readouterr().err
    rows = np.eye(8, dtype=np.float32)[:4]
    rows[1], rows[2, 3] = 0, np.nan
    np.save(tmp_path / "index.npy", rows)
    assert narrow.main(arguments) == 0
    assert "4 vectors of width 3; 2 of them have no direction" in capsys.readouterr().out
    np.save(tmp_path / "index.npy", np.zeros((0, 8), np.float16))
    assert narrow.main(arguments) == 0
    assert "direction" not in capsys.readouterr().out
    assert np.load(tmp_path / "out.npy").shape == (0, 3)
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


@pytest.mark.parametrize("name", ["match_embeddings", "match_similarities", "keep_index"])
def test_the_recipes_enter_the_space(name: str, tiny_mpnet: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    spec = importlib.util.spec_from_file_location(name, RECIPES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    texts = {"documents" if name == "keep_index" else "data": (str(tmp_path / "texts.txt"),)}
    recipe.main(
        recipe.Recipe(
            **texts,
            teacher=recipe.TeacherConfig(name=str(tiny_mpnet)),
            student=StudentConfig(space=8, width=8, vocabulary=150, table="int8"),
            train=TrainConfig(steps=3, batch_size=16),
            store=tmp_path / "store",
            output=tmp_path / "run",
            held_out=20,
        )
    )
    student = Encoder.from_pretrained(tmp_path / "run" / "student")
    assert (student.width, len(student.backbone.table)) == (8, 150)
    record = json.loads((tmp_path / "run" / "student" / "distill.json").read_text())
    assert (record["space"]["width"], record["table"]["form"]) == (8, "int8")
    assert narrow.read_directions(tmp_path / "run" / "student").shape == (8, tiny.WIDTH)
