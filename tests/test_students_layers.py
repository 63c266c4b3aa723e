"""Layers of the real model classes are kept as they are in the teacher, or refused by name; the best ones are found."""

import json
from collections.abc import Callable
from importlib.metadata import version
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from packaging.version import Version
from test_students import TEXTS, gap, is_the_same_model_when_saved, phrases
from transformers import (
    AlbertConfig,
    AlbertModel,
    DebertaV2Config,
    DebertaV2Model,
    GPT2Config,
    GPT2Model,
    ModernBertConfig,
    ModernBertModel,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5EncoderModel,
)

from distill import students
from distill.encoder import Encoder
from distill.errors import RecipeError
from distill.heads import Projection
from distill.modules import Normalize, Pooling, TransformerBackbone
from distill.similarity import normalize, pairwise_cosine
from distill.students import choosing
from distill.students.blocks import only_layers

LAYERS = 4
OLD = Version(version("transformers")) < Version("5.18")


def around(model: Any, tokenizer: Any) -> Encoder:
    model.config.use_cache = False  # as distill's reader sets it
    backbone = TransformerBackbone(model, Pooling(tiny.WIDTH), pad_id=tokenizer.pad_token_id)
    return Encoder(backbone, tokenizer, head=[Normalize()], max_length=tiny.MAX_LENGTH, name="teacher").eval()


def roberta() -> Encoder:
    tokenizer = tiny.wordpiece("<s>", "</s>")
    config = RobertaConfig(
        **tiny._sizes(tokenizer, LAYERS), intermediate_size=64, max_position_embeddings=tiny.MAX_LENGTH + 2
    )
    return around(tiny._random(RobertaModel, config), tokenizer)


def modernbert() -> Encoder:
    """Every third layer sees the whole text, the others 4 tokens to each side."""
    tokenizer = tiny.wordpiece()
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 2)
    config = ModernBertConfig(
        **tiny._sizes(tokenizer, LAYERS), intermediate_size=64, local_attention=8, max_position_embeddings=64, **special
    )
    return around(tiny._random(ModernBertModel, config), tokenizer)


def deberta() -> Encoder:
    """Relative positions, and a convolution behind whichever layer comes first."""
    tokenizer = tiny.wordpiece()
    config = DebertaV2Config(
        **tiny._sizes(tokenizer, LAYERS),
        intermediate_size=64,
        max_position_embeddings=tiny.MAX_LENGTH,
        relative_attention=True,
        position_buckets=8,
        pos_att_type=["p2c", "c2p"],
        conv_kernel_size=3,
        conv_act="gelu",
    )
    return around(tiny._random(DebertaV2Model, config), tokenizer)


def t5() -> Encoder:
    """The first layer holds the position bias that all layers use."""
    tokenizer = tiny.wordpiece()
    config = T5Config(
        vocab_size=len(tokenizer), d_model=tiny.WIDTH, d_kv=8, num_heads=4, d_ff=64, num_layers=LAYERS, pad_token_id=0
    )
    return around(tiny._random(T5EncoderModel, config), tokenizer)


def gpt2(scaled: bool) -> Encoder:
    tokenizer = tiny.byte_pairs()
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=tiny.WIDTH,
        n_layer=LAYERS,
        n_head=4,
        n_positions=tiny.MAX_LENGTH,
        initializer_range=0.3,
        scale_attn_by_inverse_layer_idx=scaled,
    )
    return around(tiny._random(GPT2Model, config), tokenizer)


def in_place(teacher: Encoder, path: str, kept: list[int]) -> torch.Tensor:
    """The oracle: the teacher's own model with the other layers taken out of its list."""
    with only_layers(teacher.backbone.model, path, kept):
        return teacher.encode(TEXTS)


# Keeping


@pytest.mark.parametrize(
    ("make", "path", "kept"),
    [
        (roberta, "encoder.layer", [1, 3]),
        pytest.param(
            modernbert, "layers", [0, 3], marks=pytest.mark.skipif(OLD, reason="refused before 5.18: see below")
        ),
        (modernbert, "layers", [0, 1, 2]),
        (deberta, "encoder.layer", [1, 3]),
        (deberta, "encoder.layer", [0, 1]),
        (t5, "encoder.block", [0, 2]),
        (lambda: gpt2(False), "h", [1, 2]),
    ],
    ids=["roberta", "modernbert", "modernbert-sliding", "deberta", "deberta-two", "t5", "gpt2"],
)
def test_a_student_is_the_teacher_without_the_other_layers(
    tmp_path: Path, make: Callable[[], Encoder], path: str, kept: list[int]
) -> None:
    teacher = make()
    before = teacher.fingerprint(), teacher.encode(TEXTS)
    student = students.keep_layers(teacher, kept)
    assert student.backbone.model.config.num_hidden_layers == len(kept)
    assert gap(student.encode(TEXTS), in_place(teacher, path, kept)) <= 1e-6
    other = [*kept[:-1], next(number for number in (1, 2, 3) if number not in kept)]
    assert gap(student.encode(TEXTS), in_place(teacher, path, sorted(other))) > 1e-3
    assert teacher.fingerprint() == before[0]
    assert torch.equal(teacher.encode(TEXTS), before[1])
    student.save_pretrained(tmp_path / "student")
    is_the_same_model_when_saved(student, tmp_path / "again")


@pytest.mark.skipif(OLD, reason="this release does it by itself")
def test_a_config_that_transformers_cannot_read_back_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As releases before 5.18 could not where only one kind of ModernBERT's layers was left."""
    teacher = modernbert()

    def refuse(values: dict[str, Any], **_: Any) -> None:
        raise TypeError(f"rope_parameters of {values['num_hidden_layers']} layers")

    monkeypatch.setattr(ModernBertConfig, "from_dict", refuse)
    with pytest.raises(
        RecipeError, match=r"does not take the config.*TypeError: rope_parameters of 2.*Update transformers"
    ):
        students.keep_layers(teacher, [0, 3])


@pytest.mark.skipif(not OLD, reason="releases before 5.18")
def test_layers_of_one_kind_are_refused_by_old_releases() -> None:
    with pytest.raises(RecipeError, match=r"does not take the config that it writes.*Update transformers"):
        students.keep_layers(modernbert(), [0, 3])


def test_sliding_windows_follow_their_layers() -> None:
    teacher = modernbert()
    kinds = teacher.backbone.model.config.layer_types
    assert kinds == ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    model = students.keep_layers(teacher, [0, 2, 3]).backbone.model
    assert model.config.layer_types == [kinds[0], kinds[2], kinds[3]]
    assert [layer.attn.sliding_window for layer in model.layers] == [None, 5, None]


def test_a_first_layer_of_another_kind_has_to_stay() -> None:
    with pytest.raises(RecipeError, match=r"attn_norm\.weight than the student has\. Keep layer 0 of teacher"):
        students.keep_layers(modernbert(), [1, 3])


def test_the_bias_that_all_layers_use_stays_without_the_layer_that_held_it() -> None:
    teacher = t5()
    student = students.keep_layers(teacher, [1, 2])
    bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    assert torch.equal(student.backbone.model.state_dict()[bias], teacher.backbone.model.state_dict()[bias])
    assert gap(student.encode(TEXTS), in_place(teacher, "encoder.block", [1, 2])) > 1e-4, (
        "without it, there is no order"
    )


def test_a_layer_that_depends_on_its_place_is_refused() -> None:
    with pytest.raises(RecipeError, match="does something else when it stands at another place"):
        students.keep_layers(gpt2(True), [1, 2])
    assert students.keep_layers(gpt2(True), [0, 1]).name == "teacher-layers-0-1"


@pytest.mark.parametrize("groups", [1, LAYERS])
def test_shared_layers_are_refused_by_name(groups: int) -> None:
    tokenizer = tiny.wordpiece()
    config = AlbertConfig(
        **tiny._sizes(tokenizer, LAYERS), embedding_size=16, intermediate_size=32, num_hidden_groups=groups
    )
    with pytest.raises(RecipeError, match=r"AlbertModel.*runs the same weights several times.*Start from students\."):
        students.keep_layers(around(tiny._random(AlbertModel, config), tokenizer), 2)


def test_lists_inside_layers_are_no_lists_of_layers() -> None:
    """A T5 of two layers: each layer is itself a list of two."""
    teacher = t5()
    two = students.keep_layers(teacher, 2)
    assert students.keep_layers(two, [1]).backbone.model.config.num_layers == 1


def test_making_a_student_draws_nothing(tiny_bert: Path) -> None:
    teacher = Encoder.from_pretrained(tiny_bert)
    state = torch.get_rng_state()
    students.keep_layers(teacher, 2)
    assert torch.equal(torch.get_rng_state(), state)


# Choosing


def brute_force(teacher: Encoder, count: int, texts: list[str]) -> dict[tuple[int, ...], float]:
    """The cosine of every set, each by its own student."""
    vectors = teacher.encode(texts)
    total = teacher.backbone.model.config.num_hidden_layers
    return {
        kept: float(pairwise_cosine(students.keep_layers(teacher, list(kept)).encode(texts), vectors).mean())
        for kept in combinations(range(total), count)
    }


@pytest.mark.parametrize("kind", ["bert", "mpnet", "distilbert", "qwen"])
def test_a_set_scores_what_its_student_scores(tiny_model: Callable[..., Path], kind: str) -> None:
    teacher, texts = Encoder.from_pretrained(tiny_model(kind)), phrases(40)
    before = teacher.fingerprint(), teacher.backbone.model.config.to_json_string()
    expected = brute_force(teacher, 2, texts)
    choice = students.choose_layers(teacher, 2, texts=texts)
    for kept, cosine in choice.tried.items():
        assert cosine == pytest.approx(expected[kept], abs=1e-5), kept
    assert choice.cosine == max(choice.tried.values())
    assert (teacher.fingerprint(), teacher.backbone.model.config.to_json_string()) == before


@pytest.mark.parametrize("make", [deberta, t5] if OLD else [deberta, modernbert, t5])
def test_replayed_layers_are_those_that_ran(make: Callable[[], Encoder]) -> None:
    teacher, texts = make(), phrases(20)
    choice = students.choose_layers(teacher, 2, texts=texts)
    vectors = teacher.encode(texts)
    assert len(choice.tried) > 2
    for kept, cosine in choice.tried.items():
        own = students.keep_layers(teacher, list(kept)).encode(texts)
        assert cosine == pytest.approx(float(pairwise_cosine(own, vectors).mean()), abs=1e-5), kept
        assert kept[0] == 0 or make is deberta


def test_exchanges_end_where_no_exchange_helps(tiny_bert: Path) -> None:
    teacher, texts = Encoder.from_pretrained(tiny_bert), phrases(40)
    everything = brute_force(teacher, 3, texts)
    choice = students.choose_layers(teacher, 3, texts=texts, passes=1e3)
    neighbours = [kept for kept in everything if len(set(kept) & set(choice.layers)) == 2]
    assert choice.cosine >= max(everything[kept] for kept in neighbours) - 1e-6
    assert choice.cosine > min(everything[kept] for kept in choosing.usual_sets(3, tiny.LAYERS)) + 1e-3
    assert choice.passes < sum(1 for _ in everything) * 3 / tiny.LAYERS, "what is remembered does not run again"


def test_the_budget_holds_and_the_choice_repeats(tiny_bert: Path) -> None:
    teacher, texts = Encoder.from_pretrained(tiny_bert), phrases(40)
    small = students.choose_layers(teacher, 3, texts=texts, passes=1.0)
    large = students.choose_layers(teacher, 3, texts=texts)
    assert small.passes <= 1.0 < large.passes <= 8.0
    assert 1 <= len(small.tried) < len(large.tried)
    assert set(small.tried) < set(large.tried)
    again = students.choose_layers(teacher, 3, texts=texts)
    assert (again.layers, again.tried) == (large.layers, large.tried)


def test_forgetting_costs_passes_and_changes_nothing(tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, texts = Encoder.from_pretrained(tiny_bert), phrases(40)
    remembered = students.choose_layers(teacher, 3, texts=texts, passes=1e3)
    monkeypatch.setattr(choosing, "REMEMBERED_BYTES", 0)
    forgotten = students.choose_layers(teacher, 3, texts=texts, passes=1e3)
    assert forgotten.tried == pytest.approx(remembered.tried, abs=1e-6)
    assert forgotten.passes == len(forgotten.tried) * 3 / tiny.LAYERS
    assert remembered.passes < forgotten.passes


@pytest.mark.parametrize(("rows", "width"), [(30, 8), (12, 20)])
def test_after_ridge_is_the_regression_without_each_row(rows: int, width: int) -> None:
    """Against n regressions, each solved without one row, at the same penalty."""
    student, teacher = torch.randn(rows, width), torch.randn(rows, 5)
    teacher[:, :2] += student[:, :2] * 3
    unit, best = normalize(student).double(), -1.0
    for ridge in choosing.RIDGES:
        penalty = ridge * torch.linalg.eigvalsh(unit @ unit.T).mean()
        predicted = []
        for row in range(rows):
            rest = [other for other in range(rows) if other != row]
            gram = unit[rest].T @ unit[rest] + penalty * torch.eye(width)
            predicted.append(unit[row] @ torch.linalg.solve(gram, unit[rest].T @ teacher[rest].double()))
        best = max(best, float(pairwise_cosine(torch.stack(predicted), teacher.double()).mean()))
    assert choosing.after_ridge(student, teacher) == pytest.approx(best, abs=1e-6)
    fitted = Projection.ridge(normalize(student), teacher, ridge=1e-7)
    assert best < pairwise_cosine(fitted(normalize(student)), teacher).mean().item(), "its own row would flatter it"


def test_a_projection_is_chosen_for_after_the_regression(tiny_bert: Path) -> None:
    teacher, texts = Encoder.from_pretrained(tiny_bert), phrases(60)
    vectors = teacher.encode(texts)
    choice = students.choose_layers(teacher, 2, texts=texts, vectors=vectors, projection=True)
    assert "after a ridge projection" in str(choice)
    for kept, cosine in list(choice.tried.items())[:3]:
        own = students.keep_layers(teacher, list(kept)).encode(texts)
        assert cosine == pytest.approx(choosing.after_ridge(own, vectors), abs=1e-4)


def test_auto_keeps_the_layers_that_were_chosen(tiny_bert: Path, capfd: pytest.CaptureFixture[str]) -> None:
    teacher, texts = Encoder.from_pretrained(tiny_bert), phrases(40)
    choice = students.choose_layers(teacher, 2, texts=texts)
    student = students.keep_layers(teacher, "auto", count=2, texts=texts, vectors=teacher.encode(texts))
    assert student.name == f"bert-layers-{'-'.join(map(str, choice.layers))}"
    said = capfd.readouterr().err
    assert (
        f"layers {' '.join(map(str, choice.layers))} of 6: cosine {choice.cosine:.3f} to the teacher on 40 texts"
        in said
    )
    assert f"{len(choice.tried)} sets tried in {choice.passes:.1f} passes of the teacher" in said


def test_roles_are_read_with_their_prompts_and_unusable_rows_left_out(tiny_model: Callable[..., Path]) -> None:
    teacher = Encoder.from_pretrained(tiny_model("bert", prompts={"query": "How do I ", "document": ""}))
    texts = {"query": phrases(20), "document": phrases(20, seed=1)}
    vectors = torch.cat([teacher.encode(some, role=role) for role, some in texts.items()])
    by_role = students.choose_layers(teacher, 2, texts=texts)
    assert students.choose_layers(teacher, 2, texts=texts, vectors=vectors).tried == by_role.tried
    alone = students.choose_layers(teacher, 2, texts=[*texts["query"], *texts["document"]])
    assert alone.tried != by_role.tried
    vectors[3], vectors[4] = float("nan"), 0.0
    assert students.choose_layers(teacher, 2, texts=texts, vectors=vectors).texts == 38


def test_what_cannot_be_chosen_is_refused(tiny_bert: Path) -> None:
    teacher = Encoder.from_pretrained(tiny_bert)
    with pytest.raises(RecipeError, match=r"compares sets of layers on texts; give texts="):
        students.keep_layers(teacher, "auto")
    with pytest.raises(RecipeError, match="got layers=2 as well"):
        students.keep_layers(teacher, 2, texts=TEXTS)
    for count in (0, 7):
        with pytest.raises(RecipeError, match=f"has 6 layers; asked to choose {count}"):
            students.choose_layers(teacher, count, texts=TEXTS)
    with pytest.raises(RecipeError, match=r"14 texts and teacher vectors \(3, 32\); expected \(14, 32\)"):
        students.choose_layers(teacher, 2, texts=TEXTS, vectors=torch.ones(3, 32))
    with pytest.raises(RecipeError, match="8 texts at least, better some hundred; got 5"):
        students.choose_layers(teacher, 2, texts=TEXTS[:5])
    with pytest.raises(RecipeError, match="static table"):
        students.choose_layers(students.static(teacher, width=4), 2, texts=TEXTS)


@pytest.mark.parametrize("total", [1, 2, 5, 12, 24])
def test_usual_sets_are_sets_of_as_many_layers(total: int) -> None:
    for count in range(1, total + 1):
        sets = choosing.usual_sets(count, total)
        assert len(set(sets)) == len(sets)
        for kept in sets:
            assert list(kept) == sorted(set(kept))
            assert (len(kept), kept[0] >= 0, kept[-1] < total) == (count, True, True)
    assert (0, 1, 11) in choosing.usual_sets(3, 12)
    assert (3, 7, 11) in choosing.usual_sets(3, 12)


def test_the_saved_config_says_as_many_layers(tmp_path: Path) -> None:
    students.keep_layers(modernbert(), [0, 2]).save_pretrained(tmp_path / "student")
    config = json.loads((tmp_path / "student" / "config.json").read_text())
    assert (config["num_hidden_layers"], len(config["layer_types"])) == (2, 2)
