"""Groups of flags: combinations that cannot be are refused when they are made, before weights load."""

from pathlib import Path
from typing import Any

import pytest
import runs
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from distill import students
from distill.config import EvaluationConfig, StudentConfig, TeacherConfig, hold_out
from distill.data import load_texts
from distill.embed import embed
from distill.encoder import Encoder
from distill.errors import DataError, DistillError, RecipeError
from distill.similarity import pairwise_cosine
from distill.store import Store


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (StudentConfig, {"kind": "pretrained"}, "--student.name names the model"),
        (StudentConfig, {"name": "x/y"}, "--student.name names the model"),
        (StudentConfig, {"kind": "layers", "width": 64}, "--student.width is of --student.kind static"),
        (StudentConfig, {"layers": (0, 1)}, "--student.layers is of --student.kind layers"),
        (StudentConfig, {"kind": "layers", "layers": (1, 0)}, "rising numbers from 0, got 1 0"),
        (StudentConfig, {"kind": "layers", "layers": (0, 0)}, "rising numbers"),
        (StudentConfig, {"kind": "layers", "layers": (-1, 0)}, "rising numbers"),
        (
            StudentConfig,
            {"intermediate": 8},
            "--student.intermediate and --student.heads prune a transformer .* got kind static",
        ),
        (StudentConfig, {"kind": "tiny", "heads": 2}, "got kind tiny, which is made as small as it is asked to be"),
        (StudentConfig, {"kind": "layers", "intermediate": 0}, "--student.intermediate is 1 or more, got 0"),
        (StudentConfig, {"width": 16, "space": 8}, "--student.width is at most --student.space 8, got 16"),
        (StudentConfig, {"width": 0}, "--student.width is 1 or more, got 0"),
        (TeacherConfig, {"max_length": 0}, "--teacher.max-length is 1 or more, got 0"),
        (EvaluationConfig, {"corpus": "x"}, "--evaluation.corpus, --evaluation.queries, --evaluation.qrels belong"),
        (EvaluationConfig, {"classify_test": "x"}, "--evaluation.classify-train, --evaluation.classify-test belong"),
    ],
)
def test_what_cannot_be_is_refused(kind: type, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        kind(**options)


@pytest.mark.parametrize(("asked", "gives"), [(16, 16), (128, tiny.MAX_LENGTH), (None, tiny.MAX_LENGTH)])
def test_a_teacher_cuts_at_the_lower_of_both_limits(tiny_bert: Path, asked: int | None, gives: int) -> None:
    assert TeacherConfig(name=str(tiny_bert), max_length=asked).load().max_length == gives


E5 = {"query": "query: ", "passage": "passage: ", "document": ""}


@pytest.mark.parametrize(
    ("prompts", "default", "says"), [(E5, None, "query, passage"), (E5, "query", ""), ({"query": ""}, None, "")]
)
def test_prompts_that_are_left_out_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], prompts: dict[str, str], default: str | None, says: str
) -> None:
    folder = tiny.bert(tmp_path / "e5", layers=1, prompts=prompts, default_prompt_name=default)
    capsys.readouterr()
    TeacherConfig(name=str(folder)).load()
    assert capsys.readouterr().out == ""
    TeacherConfig(name=str(folder)).load(in_roles=False)
    out = capsys.readouterr().out
    assert (f"has prompts for {says}, and none by default" in out) if says else out == ""


def test_a_max_length_without_room_for_a_token_is_refused(tiny_bert: Path) -> None:
    with pytest.raises(RecipeError, match=r"--teacher.max-length is 3 or more .* got 2"):
        TeacherConfig(name=str(tiny_bert), max_length=2).load()


@pytest.mark.parametrize(
    ("options", "name", "width"),
    [
        ({}, "bert-static-32", tiny.WIDTH),
        ({"width": 8}, "bert-static-8", tiny.WIDTH),
        ({"kind": "layers"}, "bert-layers-0-1-5", tiny.WIDTH),
        ({"kind": "layers", "layers": (2, 4), "projection": "ridge"}, "bert-layers-2-4", tiny.WIDTH),
    ],
)
def test_each_kind_of_student_emits_vectors_of_the_teachers_width(
    tiny_bert: Path, tmp_path: Path, options: dict[str, Any], name: str, width: int
) -> None:
    teacher = TeacherConfig(name=str(tiny_bert)).load()
    store = embed(tiny.SENTENCES, teacher, tmp_path / "store")
    student = StudentConfig(**options).build(teacher, store, tiny.SENTENCES)
    assert (student.name, student.width) == (name, width)


def test_layers_are_kept_of_a_student_on_the_way_to_a_smaller_one(tiny_bert: Path, tmp_path: Path) -> None:
    """Two hops: six layers to four, trained and exported, and those to two."""
    teacher = TeacherConfig(name=str(tiny_bert)).load()
    store = embed(tiny.SENTENCES, teacher, tmp_path / "store")
    first = StudentConfig(kind="layers", layers=(0, 1, 4, 5), projection="ridge").build(teacher, store, tiny.SENTENCES)
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.mul_(1.1)  # as if trained
    first.save_pretrained(tmp_path / "student")
    config = StudentConfig(kind="layers", name=str(tmp_path / "student"), layers=(0, 3))
    second = config.build(teacher, store, tiny.SENTENCES)
    assert second.width == teacher.width
    mine, theirs = (student.backbone.model.encoder.layer for student in (second, first))
    assert len(mine) == 2
    for one, other in zip(mine, (theirs[0], theirs[3]), strict=True):
        for left, right in zip(one.parameters(), other.parameters(), strict=True):
            assert torch.equal(left, right)
    assert torch.equal(second.head[0].linear.weight, first.head[0].linear.weight)


def test_a_static_student_is_trained_on(tiny_bert: Path, tmp_path: Path) -> None:
    teacher = TeacherConfig(name=str(tiny_bert)).load()
    store = embed(tiny.SENTENCES, teacher, tmp_path / "store")
    StudentConfig(width=8).build(teacher, store, tiny.SENTENCES).save_pretrained(tmp_path / "student")
    again = StudentConfig(kind="pretrained", name=str(tmp_path / "student")).build(teacher, store, tiny.SENTENCES)
    assert again.backbone.table.requires_grad
    with pytest.raises(
        RecipeError, match=r"static already\. Start from it with .*--student\.kind pretrained --student\.name"
    ):
        StudentConfig(width=8).check(again)


def test_a_student_of_another_space_is_no_first_hop(tiny_bert: Path, tiny_bert_cls: Path, tmp_path: Path) -> None:
    teacher = TeacherConfig(name=str(tiny_bert)).load()
    store = embed(tiny.SENTENCES, teacher, tmp_path / "store")
    config = StudentConfig(kind="layers", name=str(tiny_bert_cls), layers=(0,))
    with pytest.raises(
        RecipeError, match=r"has width 24, the teacher 32\. Start from it with --student\.kind pretrained"
    ):
        config.build(teacher, store, tiny.SENTENCES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 33}, r"has width 1\.\.32, got 33"),
        ({"kind": "tiny", "width": 4}, r"width 8 or more.*got layers=2, width=4"),
        ({"kind": "layers", "layers": (0, 6)}, r"bert has layers 0\.\.5; asked to keep \(0, 6\)"),
        ({"kind": "layers", "layers": "auto", "depth": 7}, r"bert has layers 0\.\.5; asked to keep 7"),
        ({"kind": "layers", "intermediate": 65}, "BertModel has 64 feed-forward neurons in a layer; asked to keep 65"),
        ({"kind": "layers", "heads": 2}, "BertModel: the width of a head is hidden_size"),
        ({"kind": "pretrained", "name": "{qwen}", "heads": 3}, "heads go in groups of 2"),
        ({"kind": "layers", "name": "{qwen}", "layers": (4,)}, r"qwen has layers 0\.\.3; asked to keep \(4,\)"),
        ({"kind": "pretrained", "name": "no/such"}, "no/such"),
        ({"space": 32}, r"bert's has 1\.\.31 directions, got 32"),
    ],
)
def test_what_this_teacher_cannot_give_is_refused_before_it_embeds(
    tiny_bert: Path, tiny_qwen: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    named = {name: str(tiny_qwen) if value == "{qwen}" else value for name, value in options.items()}
    with pytest.raises(DistillError, match=message):
        StudentConfig(**named).check(TeacherConfig(name=str(tiny_bert)).load())


@pytest.mark.parametrize(
    "options",
    [{}, {"kind": "tiny"}, {"kind": "layers", "layers": "auto"}, {"kind": "layers", "intermediate": 64}, {"space": 31}],
)
def test_what_this_teacher_can_give_is_not(tiny_bert: Path, options: dict[str, Any]) -> None:
    StudentConfig(**options).check(TeacherConfig(name=str(tiny_bert)).load())


def pruned(folder: Path, path: Path, texts: list[str], **options: Any) -> tuple[Encoder, Encoder, float]:
    """A pruned student, what it is pruned from, and its mean cosine to the teacher."""
    teacher = TeacherConfig(name=str(folder)).load()
    store = embed(texts, teacher, path)
    whole = StudentConfig(**{name: value for name, value in options.items() if name not in ("intermediate", "heads")})
    small = StudentConfig(**options).build(teacher, store, texts)
    cosine = pairwise_cosine(small.encode(texts), store.vectors(texts, prompt=teacher.prompt(None))).mean()
    return small, whole.build(teacher, store, texts), float(cosine)


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "layers", "layers": (0, 5)},
        {"kind": "layers", "layers": (0, 5), "projection": "ridge"},
        {"kind": "layers", "layers": "auto", "depth": 2},
        {"kind": "pretrained", "name": "{cls}"},
    ],
)
def test_neurons_are_pruned_by_what_the_teacher_says(
    tiny_bert: Path, tiny_bert_cls: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    """With the texts and vectors that the prune itself is given: the same student as by hand, then fitted."""
    named = {name: str(tiny_bert_cls) if value == "{cls}" else value for name, value in options.items()}
    texts = runs.texts(60)
    small, whole, cosine = pruned(tiny_bert, tmp_path / "store", texts, intermediate=16, **named)
    assert small.backbone.model.config.intermediate_size == 16
    assert small.backbone.model.config.num_hidden_layers == whole.backbone.model.config.num_hidden_layers == 2
    assert small.name == f"{whole.name}-ff16"
    assert not small.backbone.model.get_input_embeddings().weight.requires_grad
    by_hand = students.prune(whole, intermediate=16, texts=texts, vectors=Store.open(tmp_path / "store").vectors(texts))
    if options["kind"] == "pretrained" or "projection" in options:  # fitted again, to the smaller student
        plain = float(pairwise_cosine(by_hand.encode(texts), Store.open(tmp_path / "store").vectors(texts)).mean())
        assert cosine > plain
    else:
        assert small.fingerprint() == by_hand.fingerprint()
    small.save_pretrained(tmp_path / "small")
    torch.testing.assert_close(Encoder.from_pretrained(tmp_path / "small").encode(texts), small.encode(texts))


def test_heads_are_pruned_where_the_class_allows_it(tiny_qwen: Path, tmp_path: Path) -> None:
    options = {"kind": "layers", "layers": (0, 1, 3), "heads": 2, "intermediate": 32}
    small, _, _ = pruned(tiny_qwen, tmp_path / "store", runs.texts(40), **options)
    config = small.backbone.model.config
    assert (config.num_attention_heads, config.intermediate_size, config.num_hidden_layers) == (2, 32, 3)


@pytest.mark.parametrize("train", [True, False])
def test_the_token_table_of_a_transformer_is_trained_on_demand(tiny_bert: Path, tmp_path: Path, train: bool) -> None:
    teacher = TeacherConfig(name=str(tiny_bert)).load()
    store = embed(tiny.SENTENCES, teacher, tmp_path / "store")
    student = StudentConfig(kind="layers", train_token_table=train).build(teacher, store, tiny.SENTENCES)
    assert student.backbone.model.get_input_embeddings().weight.requires_grad is train


def test_a_pretrained_student_is_fitted_to_texts_that_are_stored_by_role(tmp_path: Path, tiny_bert_cls: Path) -> None:
    prompts = {"query": "How do I ", "document": "Interest rates: "}
    teacher = Encoder.from_pretrained(tiny.bert(tmp_path / "prompted", layers=2, prompts=prompts))
    texts = {"query": tiny.SENTENCES[:6], "document": tiny.SENTENCES[6:]}
    for role, some in texts.items():
        store = embed(some, teacher, tmp_path / "store", role=role)
    student = StudentConfig(kind="pretrained", name=str(tiny_bert_cls)).build(teacher, store, texts)
    assert (student.width, student.name) == (teacher.width, "prompted-bert_cls_dense")
    expected = students.pretrained(tiny_bert_cls, teacher)
    students.fit_projection(expected, texts, lambda some, role: store.vectors(some, prompt=teacher.prompt(role)))
    assert student.fingerprint() == expected.fingerprint(), "fitted, though it is as wide as its own transformer"


@given(
    texts=st.lists(st.text(min_size=1), unique=True, min_size=2, max_size=60),
    count=st.integers(0, 40) | st.none(),
    seed=st.randoms(),
)
def test_held_out_texts_are_a_part_of_the_texts_whatever_their_order(
    texts: list[str], count: int | None, seed: Any
) -> None:
    if count is not None and len(texts) - count < 2:
        with pytest.raises(RecipeError, match="leaves fewer than 2"):
            hold_out(texts, count)
        return
    train, held = hold_out(texts, count)
    assert len(held) == (min(500, len(texts) // 10) if count is None else count)
    assert sorted([*train, *held]) == sorted(texts)
    assert [text for text in texts if text in set(held)] == held
    shuffled = list(texts)
    seed.shuffle(shuffled)
    assert set(hold_out(shuffled, count)[1]) == set(held)


def test_evaluation_data_is_read_by_name_and_a_mistake_in_a_file_shows(tmp_path: Path) -> None:
    (tmp_path / "sts.v2.csv").write_text("a one,a two,3.5\nb one,b two,1\n")
    data = EvaluationConfig(sts=(str(tmp_path / "sts.v2.csv"),)).load(["held out"], role="document")
    assert (list(data.pairs), data.texts, data.role) == (["sts"], ["held out"], "document")
    assert data.seen_in_training == {}
    data = EvaluationConfig(sts=(str(tmp_path / "sts.v2.csv"),)).load(
        [], training_texts=["b one", "a two", "a one", "else"]
    )
    assert data.seen_in_training == {"sentences of sts": 3}
    names = {
        "corpus": "docs.jsonl.gz",
        "queries": "q",
        "qrels": "r",
        "classify_train": "a.csv",
        "classify_test": "b.csv",
    }
    tasks = EvaluationConfig(sts=("sts.v2.csv",), **names).tasks()
    assert tasks == ["sts spearman", "b accuracy", "docs ndcg@10", "docs recall@10"]
    assert EvaluationConfig(sts=("org/sts@v1.0::test",)).tasks() == EvaluationConfig(sts=("org/sts::test",)).tasks()
    with pytest.raises(DataError, match=r"absent\.csv"):
        EvaluationConfig(sts=(str(tmp_path / "absent.csv"),)).load([])


def test_held_out_texts_do_not_depend_on_the_order_of_files(tmp_path: Path) -> None:
    for name, texts in {"a.txt": tiny.SENTENCES[:6], "b.txt": tiny.SENTENCES[6:]}.items():
        (tmp_path / name).write_text("\n".join(texts))
    names = [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]
    one, other = (load_texts(order).texts for order in (names, names[::-1]))
    assert one != other
    assert set(hold_out(one, 4)[1]) == set(hold_out(other, 4)[1])
