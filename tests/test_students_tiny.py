"""A small transformer begins as the static student, and can learn what that cannot; every student says how it starts."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_students import TEXTS, gap, is_the_same_model_when_saved, phrases

from distill import students
from distill.config import StudentConfig, TeacherConfig, describe_start
from distill.embed import embed
from distill.encoder import Encoder
from distill.errors import RecipeError
from distill.modules import Dense, Normalize
from distill.similarity import pairwise_cosine
from distill.students.summary import stored_bytes


@pytest.mark.parametrize("kind", ["bert", "mpnet", "qwen", "bert_cls_dense"])
def test_a_tiny_student_begins_as_the_static_one(tiny_model: Callable[..., Path], tmp_path: Path, kind: str) -> None:
    teacher, texts = Encoder.from_pretrained(tiny_model(kind)), phrases(40)
    before = teacher.fingerprint()
    student = students.tiny(teacher, width=16, texts=texts)
    static = students.static(teacher, width=12, texts=texts)
    assert gap(student.encode(texts), static.encode(texts)) <= 1e-4
    assert [type(layer) for layer in student.head] == [Dense, Normalize]
    assert (student.width, student.backbone.width, student.max_length) == (teacher.width, 16, teacher.max_length)
    is_the_same_model_when_saved(student, tmp_path / "tiny")
    assert teacher.fingerprint() == before


@torch.no_grad()
def test_a_layer_norm_leaves_every_token_as_it_is(tiny_bert: Path) -> None:
    student = students.tiny(Encoder.from_pretrained(tiny_bert), width=16)
    embeddings = student.backbone.model.embeddings
    for position in (0, 1, 17, 63):
        tokens = embeddings.word_embeddings.weight + embeddings.position_embeddings.weight[position]
        assert gap(torch.nn.functional.layer_norm(tokens, (16,)), tokens) <= 1e-4


def test_special_tokens_say_nothing_at_first_and_unknown_words_do(tiny_bert: Path) -> None:
    teacher = Encoder.from_pretrained(tiny_bert)
    student = students.tiny(teacher, width=16)
    table = student.backbone.model.embeddings.word_embeddings.weight.detach()
    read = (student.head[0].linear.weight @ table.T).norm(dim=0)
    tokenizer = teacher.tokenizer
    assert read[[tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id]].max() < 1e-4
    assert read[tokenizer.unk_token_id] > 1e-3


def test_every_part_learns_and_order_can_be_told(tiny_bert: Path) -> None:
    """Two texts of the same words: the static student cannot part them, the tiny one learns to in a few steps."""
    teacher = Encoder.from_pretrained(tiny_bert)
    pair = ["dogs run across a field of snow", "a field of snow run across dogs"]
    student, static = students.tiny(teacher, width=16), students.static(teacher, width=12)
    assert gap(*static.encode(pair).split(1)) <= 1e-6
    start = pairwise_cosine(*student.encode(pair).split(1)).item()
    tokens, targets = student.tokenize(pair).tokens, teacher.encode(pair)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    for step in range(60):
        loss = (1 - pairwise_cosine(student.train()(tokens), targets)).mean()
        optimizer.zero_grad()
        loss.backward()
        if step == 1:  # in the first step only what a block gives learns, which is 0 then
            silent = [
                n for n, p in student.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())
            ]
            assert [name for name in silent if "key.bias" not in name] == []  # softmax takes a key's bias for nothing
        optimizer.step()
    assert start > 0.99 > pairwise_cosine(*student.encode(pair).split(1)).item()


def test_the_same_student_every_time_and_another_seed_another(tiny_bert: Path) -> None:
    teacher = Encoder.from_pretrained(tiny_bert)
    one, two, other = (students.tiny(teacher, width=16, seed=seed).fingerprint() for seed in (0, 0, 1))
    assert one == two != other


def test_prompts_case_and_lengths_are_the_teachers(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_model("bert", layers=2, prompts={"query": "q: "}, lowercase=False, do_lower_case=True)
    student = students.tiny(Encoder.from_pretrained(folder), width=8, max_length=20)
    assert (student.prompt("query"), student.lowercase, student.max_length) == ("q: ", True, 20)
    assert student.backbone.model.config.max_position_embeddings == 20
    is_the_same_model_when_saved(student, tmp_path / "tiny")
    assert json.loads((tmp_path / "tiny" / "config.json").read_text())["model_type"] == "bert"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 7}, "width 8 or more.* got layers=2, width=7"),
        ({"width": 37}, "reads at most 32; got layers=2, width=37, of which it reads 33"),
        ({"layers": 0, "width": 8}, "1 layer or more"),
        ({"width": 8, "max_length": 2}, r"max_length is 3\.\.64"),
        ({"width": 8, "max_length": 65}, r"max_length is 3\.\.64"),
    ],
)
def test_sizes_that_cannot_be_are_refused(tiny_bert: Path, options: dict[str, int], message: str) -> None:
    teacher = Encoder.from_pretrained(tiny_bert)
    with pytest.raises(RecipeError, match=message):
        students.tiny(teacher, **options)
    with pytest.raises(RecipeError, match="static already"):
        students.tiny(students.static(teacher, width=8), width=8)


# What a student says of itself


def test_a_description_measures_speed_and_cosine(tiny_bert: Path) -> None:
    teacher = Encoder.from_pretrained(tiny_bert)
    student, vectors = students.keep_layers(teacher, [0, 5]), teacher.encode(TEXTS)
    vectors[2], vectors[3] = float("nan"), 0.0
    line = students.describe(student, TEXTS, vectors)
    good = [number for number in range(len(TEXTS)) if number not in (2, 3)]
    cosine = pairwise_cosine(student.encode(TEXTS)[good], vectors[good]).mean()
    size = 4 * student.parameter_count / 1e6
    assert line.startswith(f"bert-layers-0-5: 0.0M parameters, {size:.3g} MB, width 32, ")
    assert line.endswith(f" texts/s, cosine to the teacher {cosine:.3f} (12 texts)")
    assert students.describe(teacher, {"query": TEXTS}).endswith(" texts/s")
    with pytest.raises(RecipeError, match=r"gives vectors \(14, 32\), got teacher vectors \(14, 3\)"):
        students.describe(student, TEXTS, torch.ones(14, 3))


@pytest.mark.parametrize("form", ["float32", "float16", "int8"])
def test_bytes_are_those_of_the_folder(tiny_bert: Path, tmp_path: Path, form: str) -> None:
    student = students.static(Encoder.from_pretrained(tiny_bert), width=24)
    student.backbone.stored_as = form
    student.save_pretrained(tmp_path / "student")
    weights = sum(path.stat().st_size for path in (tmp_path / "student").rglob("*.safetensors"))
    assert 0 <= weights - stored_bytes(student) < 600  # their headers


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"kind": "tiny"}, "bert-tiny-2x32"),
        ({"kind": "tiny", "width": 16, "depth": 1, "projection": "ridge"}, "bert-tiny-1x16"),
        ({"kind": "layers", "layers": "auto", "depth": 2}, "bert-layers-"),
        ({"kind": "layers", "layers": "auto", "projection": "ridge"}, "bert-layers-"),
    ],
)
def test_flags_build_and_describe_what_they_name(
    tiny_bert: Path, tmp_path: Path, options: dict[str, object], name: str
) -> None:
    teacher, texts = TeacherConfig(name=str(tiny_bert)).load(), phrases(300)
    store = embed(texts, teacher, tmp_path / "store")
    student = StudentConfig(**options).build(teacher, store, texts)
    assert student.name.startswith(name)
    if options["kind"] == "layers":
        assert student.backbone.model.config.num_hidden_layers == options.get("depth", 3)
    assert student.backbone.model.get_input_embeddings().weight.requires_grad is (options["kind"] == "tiny")
    assert "(256 texts)" in describe_start(student, teacher, store, texts)


def test_a_description_reads_texts_by_role(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    teacher = Encoder.from_pretrained(tiny_model("bert", layers=2, prompts={"query": "How do I "}))
    texts = {"query": phrases(200), "document": phrases(10, seed=1)}
    for role, some in texts.items():
        store = embed(some, teacher, tmp_path / "store", role=role)
    student = students.keep_layers(teacher, 2)
    assert "cosine to the teacher 1.000 (138 texts)" in describe_start(student, teacher, store, texts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 2}, "--student.depth is of --student.kind tiny or --student.layers auto"),
        ({"kind": "layers", "depth": 2}, "--student.depth is of"),
        ({"kind": "tiny", "depth": 0}, "--student.depth is 1 or more, got 0"),
        ({"kind": "tiny", "layers": "auto"}, "--student.layers is of --student.kind layers"),
        ({"kind": "tiny", "name": "x"}, "--student.name names the model"),
    ],
)
def test_flags_that_cannot_be_together_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        StudentConfig(**options)
