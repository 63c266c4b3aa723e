"""A static student with a fitted vocabulary, and with a table in fewer bytes: the same model wherever it is opened."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentence_transformers
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from distill import export, students
from distill.config import StudentConfig
from distill.embed import embed
from distill.encoder import Encoder
from distill.errors import DataError, IntegrityError, RecipeError
from distill.export import Provenance
from distill.quantized import Int8Embedding, float_rows, int8_rows, kept_table, read_table, table_tensors
from distill.similarity import pairwise_cosine
from distill.store import Store

TEXTS = [*tiny.SENTENCES, "a", "strongholds swim", "ŵ Mixed CASE"]
CORPUS = [*tiny.SENTENCES[:6], *["strongholds swim"] * 4]


@pytest.fixture
def teacher(tiny_bert: Path) -> Encoder:
    return Encoder.from_pretrained(tiny_bert)


@pytest.fixture
def provenance(teacher: Encoder) -> Provenance:
    return Provenance(teacher=teacher, data="texts", loss="CosineDistance()", command="python x.py")


def opened(path: Path, **options: bool) -> Tensor:
    model = sentence_transformers.SentenceTransformer(str(path), device="cpu", local_files_only=True, **options)
    return model.encode(TEXTS, convert_to_tensor=True)


# A fitted vocabulary


@pytest.mark.parametrize("kind", ["bert", "qwen"])
def test_a_fitted_student_opens_in_sentence_transformers_with_the_same_vectors(
    tiny_model: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    teacher = Encoder.from_pretrained(tiny_model(kind))
    vocabulary = students.fit_vocabulary(teacher, CORPUS, words=2)
    student = students.static(teacher, width=8, vocabulary=vocabulary, texts=CORPUS)
    assert len(student.backbone.table) == len(vocabulary) != len(teacher.tokenizer)
    assert student.name == f"{kind}-static-8-{len(vocabulary)}-tokens"
    student.save_pretrained(tmp_path / "student")
    again = Encoder.from_pretrained(tmp_path / "student")
    assert again.fingerprint() == student.fingerprint()
    assert torch.equal(again.tokenize(TEXTS).tokens.ids, student.tokenize(TEXTS).tokens.ids)
    assert (opened(tmp_path / "student") - student.encode(TEXTS)).abs().max() <= 1e-5


@pytest.mark.usefixtures("unchecked")
def test_token_vectors_that_cannot_be_right_are_refused(teacher: Encoder) -> None:
    good = teacher.encode_vocabulary()
    wrong = {
        r"got \(10, 32\)\.": good[:10],
        r"got \(\d+, 8\)\.": good[:, :8],
        "with NaN or infinite numbers": good.index_fill(0, torch.tensor([7]), torch.nan),
    }
    for message, vectors in wrong.items():
        with pytest.raises(DataError, match=message):
            students.static(teacher, width=8, token_vectors=vectors)
    with pytest.raises(DataError, match="a list of texts is expected, got one text"):
        students.static(teacher, width=8, token_vectors=good, texts="hello world")


def test_a_corpus_is_a_vocabulary_and_counts_for_the_weights(teacher: Encoder) -> None:
    short = students.static(teacher, width=8, vocabulary=CORPUS)
    whole = students.static(teacher, width=8, vocabulary=students.fit_vocabulary(teacher, CORPUS), texts=CORPUS)
    assert short.fingerprint() == whole.fingerprint()
    ids = [short.tokenizer.token_to_id(piece) for piece in ("the", "flute", "##v")]
    the, flute, never = short.backbone.weights.detach()[ids]
    assert the < flute < never


def test_a_token_that_stays_gives_its_text_the_same_direction(teacher: Encoder) -> None:
    """At full width nothing is lost but the mean, which is that of the tokens that stay."""
    vocabulary = students.fit_vocabulary(teacher, CORPUS, words=1)
    student = students.static(teacher, width=32, vocabulary=vocabulary)
    vectors = vocabulary.vectors(teacher.encode_vocabulary(), teacher.encode(["strongholds"]))
    texts = ["dogs", "flute", "strongholds"]
    expected = (vectors - vectors.mean(dim=0))[[vocabulary.tokenizer.token_to_id(text) for text in texts]]
    assert pairwise_cosine(student.encode(texts), expected).min() > 1 - 1e-5


def test_vectors_that_are_given_are_not_computed(teacher: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary = students.fit_vocabulary(teacher, CORPUS, words=1)
    tokens, words = teacher.encode_vocabulary(), teacher.encode(vocabulary.words)
    expected = students.static(teacher, width=8, vocabulary=vocabulary).fingerprint()

    def ran(*_: object, **__: object) -> None:
        raise AssertionError("the teacher ran")

    monkeypatch.setattr(Encoder, "encode", ran)
    monkeypatch.setattr(Encoder, "encode_vocabulary", ran)
    given = students.static(teacher, width=8, vocabulary=vocabulary, token_vectors=tokens, word_vectors=words)
    assert given.fingerprint() == expected
    with pytest.raises(RecipeError, match="has 1 words of its own"):
        students.static(teacher, width=8, vocabulary=vocabulary, token_vectors=tokens, word_vectors=torch.zeros(3, 32))


def test_a_recipe_keeps_the_vectors_of_words_in_the_store(
    teacher: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = embed(CORPUS, teacher, tmp_path / "store")
    config = StudentConfig(vocabulary=120, words=2, width=8, table="int8")
    first = config.build(teacher, store, CORPUS)
    assert len(first.backbone.table) == 120
    assert first.backbone.stored_as == "int8"
    assert first.tokenize(["strongholds"]).tokens.lengths.tolist() == [1]

    def ran(*_: object, **__: object) -> None:
        raise AssertionError("the teacher ran again")

    monkeypatch.setattr(teacher.backbone, "forward", ran)
    again = config.build(teacher, Store.open(store.path), CORPUS)
    assert again.fingerprint() == first.fingerprint()
    more = StudentConfig(words=1, width=8)
    whole = more.build(teacher, Store.open(store.path), CORPUS)
    assert len(whole.backbone.table) > 120


def test_characters_are_of_a_vocabulary(teacher: Encoder, tmp_path: Path) -> None:
    store, sizes = embed(["dogs run"], teacher, tmp_path / "store"), {}
    for which in ("all", "seen"):
        config = StudentConfig(vocabulary=90, width=8, characters=which)
        student = config.build(teacher, store, ["dogs run"])
        sizes[which] = sum(len(piece.removeprefix("##")) == 1 for piece in student.tokenizer.get_vocab())
    assert sizes["seen"] < sizes["all"]
    with pytest.raises(RecipeError, match=r"--student\.characters is of --student\.vocabulary"):
        StudentConfig(characters="seen")


@pytest.mark.parametrize("options", [{"vocabulary": 100}, {"words": 5}, {"table": "int8"}])
def test_flags_of_a_table_are_refused_for_other_students(options: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=r"--student\.table are of --student\.kind static"):
        StudentConfig(kind="layers", **options)


@pytest.mark.parametrize(("options", "flag"), [({"vocabulary": 0}, "vocabulary"), ({"space": 0}, "space")])
def test_flags_below_one_are_refused(options: dict[str, int], flag: str) -> None:
    with pytest.raises(RecipeError, match=rf"--student\.{flag} is 1 or more, got 0"):
        StudentConfig(**options)


# A table in fewer bytes


def test_int8_rows_are_as_near_as_half_a_scale() -> None:
    table = torch.randn(50, 16) * torch.logspace(-3, 3, 50)[:, None]
    table[7] = 0
    values, scales = int8_rows(table)
    assert values.abs().amax(dim=1).tolist() == [0 if row == 7 else 127 for row in range(50)]
    assert ((float_rows(values, scales) - table).abs() <= scales[:, None] * 0.5001).all()
    assert torch.equal(float_rows(values, scales)[7], torch.zeros(16))
    again, same = int8_rows(float_rows(values, scales))
    assert torch.equal(again, values)
    torch.testing.assert_close(same, scales, rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match="finite numbers"):
        int8_rows(table / 0)


@pytest.mark.parametrize("form", ["float16", "int8"])
def test_the_cost_of_a_form_is_what_the_folder_has(teacher: Encoder, tmp_path: Path, form: str) -> None:
    student = students.static(teacher, width=16, texts=TEXTS)
    plain = student.encode(TEXTS)
    cost = students.quantize(student, form)
    assert torch.equal(student.encode(TEXTS), plain), "in memory nothing changes"
    student.save_pretrained(tmp_path / "small")
    read = Encoder.from_pretrained(tmp_path / "small")
    tokens = [piece for piece in teacher.tokenizer.get_vocab() if piece.isalpha() and piece.islower()]
    lost = 1 - pairwise_cosine(read.encode(tokens), student.encode(tokens)).double()
    assert lost.max() <= cost.worst + 1e-6
    assert 0 < cost.mean < cost.worst < 1e-3
    stored = [load_file(path) for path in (tmp_path / "small").rglob("*.safetensors")]
    assert cost.bytes == sum(one.numel() * one.element_size() for tensors in stored for one in tensors.values())
    assert cost.float32_bytes == 4 * 16 * (len(teacher.tokenizer) + 32)
    assert cost.bytes < cost.float32_bytes * (0.51 if form == "float16" else 0.45)


def test_int8_costs_more_than_float16_and_float32_costs_nothing(teacher: Encoder) -> None:
    student = students.static(teacher, width=16)
    costs = [students.quantize(student, form) for form in ("float32", "float16", "int8")]
    assert costs[0].mean == costs[0].worst == 0
    assert costs[0].bytes == costs[0].float32_bytes
    assert costs[0].mean < costs[1].mean < costs[2].mean
    assert str(costs[2]).startswith(f"int8: {len(teacher.tokenizer)} tokens in 0.00 MB")


def test_a_quantized_table_is_trained_in_float32_and_read_so(teacher: Encoder, tmp_path: Path) -> None:
    student = students.static(teacher, width=8)
    students.quantize(student, "int8")
    student.save_pretrained(tmp_path / "int8")
    read = Encoder.from_pretrained(tmp_path / "int8")
    assert {p.dtype for p in read.parameters()} == {torch.float32}
    read.save_pretrained(tmp_path / "float32")  # not quantized anew unless it is asked for
    assert (opened(tmp_path / "float32") - read.encode(TEXTS)).abs().max() <= 1e-5
    students.quantize(read, "int8")
    read.save_pretrained(tmp_path / "again")
    assert (Encoder.from_pretrained(tmp_path / "again").encode(TEXTS) - read.encode(TEXTS)).abs().max() <= 1e-5


def test_sentence_transformers_opens_a_float16_folder_as_any_other(teacher: Encoder, tmp_path: Path) -> None:
    student = students.static(teacher, width=16)
    students.quantize(student, "float16")
    student.save_pretrained(tmp_path / "half")
    theirs = opened(tmp_path / "half")
    assert theirs.dtype == torch.float16
    assert (theirs.float() - student.encode(TEXTS)).abs().max() < 5e-3
    in_float32 = sentence_transformers.SentenceTransformer(str(tmp_path / "half"), device="cpu").float()
    without_tokens = ["", "  ", TEXTS[0]]  # NaN as it opens: its normalisation adds 1e-12, 0 in float16
    vectors = in_float32.encode(without_tokens, convert_to_tensor=True)
    assert (vectors - Encoder.from_pretrained(tmp_path / "half").encode(without_tokens)).abs().max() <= 1e-5
    assert not vectors[:2].any()


def test_sentence_transformers_opens_an_int8_folder_where_distill_is_installed(
    teacher: Encoder, tmp_path: Path
) -> None:
    student = students.static(teacher, width=16)
    students.quantize(student, "int8")
    student.save_pretrained(tmp_path / "int8")
    theirs = opened(tmp_path / "int8", trust_remote_code=True)
    assert (theirs - Encoder.from_pretrained(tmp_path / "int8").encode(TEXTS)).abs().max() <= 1e-5
    if int(sentence_transformers.__version__.split(".")[0]) >= 6:
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            opened(tmp_path / "int8")


def test_a_table_that_is_no_int8_table_is_named(teacher: Encoder, tmp_path: Path) -> None:
    student = students.static(teacher, width=16)
    students.quantize(student, "int8")
    student.save_pretrained(tmp_path / "bad")
    file = tmp_path / "bad" / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"embedding.scale": tensors["embedding.scale"][:1].clone()}, file)
    with pytest.raises(IntegrityError, match=r"damaged: an int8 table is \(v, d\) with v scales, got torch.int8"):
        Encoder.from_pretrained(tmp_path / "bad")
    save_file({"something": torch.zeros(1)}, file)
    with pytest.raises(IntegrityError, match=r"has no embedding\.weight; it holds something"):
        Encoder.from_pretrained(tmp_path / "bad")
    with pytest.raises(ValueError, match="holds no int8 table"):
        Int8Embedding.load(str(tmp_path / "bad"))


def test_what_is_read_is_what_was_kept() -> None:
    table = torch.randn(9, 4)
    for form in ("float32", "float16", "int8"):
        assert torch.equal(read_table(table_tensors(table, form)), kept_table(table, form))
    assert read_table({"other": table}) is None


def test_a_transformer_has_no_table_to_store(teacher: Encoder) -> None:
    with pytest.raises(RecipeError, match="is no static table"):
        students.quantize(students.keep_layers(teacher, 1))


@pytest.mark.usefixtures("unchecked")
def test_forms_that_there_are_not(teacher: Encoder) -> None:
    with pytest.raises(RecipeError, match="float32, float16, int8, got 'int4'"):
        students.quantize(students.static(teacher, width=4), "int4")


@pytest.mark.parametrize("form", ["float32", "float16", "int8"])
def test_the_card_says_how_the_table_is_stored_and_how_it_opens(
    teacher: Encoder, provenance: Provenance, tmp_path: Path, form: str
) -> None:
    student = students.static(teacher, width=16)
    cost = students.quantize(student, form)
    path = export.export(student, tmp_path / "student", provenance=provenance)
    card, record = (path / "README.md").read_text(), json.loads((path / "distill.json").read_text())
    assert (str(cost) in card) == (form != "float32")
    assert record.get("table") == (None if form == "float32" else cost.as_json())
    assert ("SentenceTransformer(FOLDER).float()" in card) == (form == "float16")
    assert ("trust_remote_code=True" in card) == ("trust_remote_code=True" in export.usage(path)) == (form == "int8")
    names: dict[str, object] = {}
    exec(compile(export.usage(path), "usage", "exec"), names)
    assert torch.as_tensor(names["vectors"]).shape == (1, 32)
