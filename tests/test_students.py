"""Students start in the teacher's space, leave the teacher as it was, and are the same model after saving."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

from distill import students
from distill.encoder import Encoder
from distill.errors import RecipeError
from distill.folder import UNLIMITED
from distill.modules import Dense, Normalize, StaticTable
from distill.similarity import pairwise_cosine

TOLERANCE = 1e-5
TEXTS = [*tiny.SENTENCES, "a", " ".join(tiny.SENTENCES)]


@pytest.fixture
def bert(tiny_bert: Path) -> Encoder:
    return Encoder.from_pretrained(tiny_bert)


def phrases(count: int, seed: int = 0) -> list[str]:
    """Texts out of the words of the sentences, in an order that no sentence has."""
    words = sorted({word for sentence in tiny.SENTENCES for word in sentence.rstrip(".?").split()})
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(words), (count, 9), generator=generator)
    return [" ".join(words[place] for place in row[: 3 + number % 7]) for number, row in enumerate(picks.tolist())]


def their_vectors(path: Path, texts: list[str]) -> Tensor:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(path), device="cpu", local_files_only=True).encode(texts, convert_to_tensor=True)


def gap(one: Tensor, two: Tensor) -> float:
    assert one.shape == two.shape
    return float((one - two).abs().max())


def is_the_same_model_when_saved(student: Encoder, path: Path) -> None:
    student.save_pretrained(path)
    again = Encoder.from_pretrained(path)
    assert gap(again.encode(TEXTS), student.encode(TEXTS)) <= 1e-6
    assert again.fingerprint() == student.fingerprint()
    assert gap(their_vectors(path, TEXTS), student.encode(TEXTS)) <= TOLERANCE


# Layers kept


def layers_of(encoder: Encoder) -> nn.ModuleList:
    model = encoder.backbone.model
    paths = {"BertModel": "encoder", "MPNetModel": "encoder", "Qwen2Model": "", "DistilBertModel": "transformer"}
    inner = model.get_submodule(paths[type(model).__name__])
    return inner.layers if hasattr(inner, "layers") else inner.layer


@pytest.mark.parametrize("kind", ["bert", "mpnet", "qwen", "distilbert"])
@pytest.mark.parametrize(("layers", "kept"), [(1, [-1]), (3, [0, 1, -1]), ([0, 2], [0, 2]), ([1, 3], [1, 3])])
def test_kept_layers_are_the_teachers(
    tiny_model: Callable[..., Path], tmp_path: Path, kind: str, layers: Any, kept: list[int]
) -> None:
    teacher = Encoder.from_pretrained(tiny_model(kind))
    before, config = teacher.fingerprint(), teacher.backbone.model.config.to_json_string()
    total = len(layers_of(teacher))
    student = students.keep_layers(teacher, layers)
    assert len(layers_of(student)) == student.backbone.model.config.num_hidden_layers == len(kept)
    for copied, number in zip(layers_of(student), kept, strict=True):
        original = layers_of(teacher)[number].state_dict()
        assert all(torch.equal(value, original[name]) for name, value in copied.state_dict().items())
    is_the_same_model_when_saved(student, tmp_path / "student")
    saved = json.loads((tmp_path / "student" / "config.json").read_text())
    assert saved["n_layers" if kind == "distilbert" else "num_hidden_layers"] == len(kept)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
    assert len(layers_of(teacher)) == total
    assert (teacher.fingerprint(), teacher.backbone.model.config.to_json_string()) == (before, config)


def test_layers_that_differ_in_kind_keep_their_kind(tiny_qwen: Path) -> None:
    teacher = Encoder.from_pretrained(tiny_qwen)
    kinds = teacher.backbone.model.config.layer_types
    assert len(set(kinds)) == 2, "the test needs layers of two kinds"
    student = students.keep_layers(teacher, [1, 2])
    model = student.backbone.model
    assert model.config.layer_types == [kinds[1], kinds[2]]
    assert [layer.self_attn.layer_idx for layer in model.layers] == [0, 1]
    assert [layer.self_attn.layer_idx for layer in teacher.backbone.model.layers] == [0, 1, 2, 3]
    long = [" ".join(tiny.SENTENCES)]  # longer than the window of the second kind
    wrong = students.keep_layers(teacher, [2, 3])
    assert gap(student.encode(long), wrong.encode(long)) > 1e-3


def test_all_layers_are_the_teacher(bert: Encoder) -> None:
    assert torch.equal(students.keep_layers(bert, tiny.LAYERS).encode(TEXTS), bert.encode(TEXTS))


@pytest.mark.parametrize("layers", [0, -1, 7, [], [6], [-1, 0], [2, 1], [1, 1]])
def test_layers_that_there_are_not(bert: Encoder, layers: Any) -> None:
    with pytest.raises(RecipeError, match=r"has layers 0\.\.5; asked to keep"):
        students.keep_layers(bert, layers)


def test_models_without_one_list_of_layers_are_refused(tiny_model: Callable[..., Path], bert: Encoder) -> None:
    with pytest.raises(RecipeError, match="has 0 lists of 4 layers"):
        students.keep_layers(Encoder.from_pretrained(tiny_model("albert")), 2)
    with pytest.raises(RecipeError, match="static table"):
        students.keep_layers(students.static(bert, width=8), 2)


def test_a_projection_starts_as_the_identity(bert: Encoder, tiny_bert_cls: Path, tmp_path: Path) -> None:
    plain, projected = students.keep_layers(bert, 2), students.keep_layers(bert, 2, projection=True)
    assert gap(plain.encode(TEXTS), projected.encode(TEXTS)) <= 1e-6
    is_the_same_model_when_saved(projected, tmp_path / "projected")
    teacher = Encoder.from_pretrained(tiny_bert_cls)
    student = students.keep_layers(teacher, 1, projection=True)
    assert [type(layer) for layer in student.head] == [Dense, Dense, Normalize]
    assert student.head[0] is not teacher.head[0]
    assert torch.equal(student.head[0].linear.weight, teacher.head[0].linear.weight)
    assert student.width == teacher.width == 24


def test_prompts_and_lengths_are_kept(tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model("bert", layers=2, prompts={"query": "q: "}, default_prompt_name="query", max_length=20)
    student = students.keep_layers(Encoder.from_pretrained(folder), 1)
    assert (student.prompt(None), student.max_length) == ("q: ", 20)
    assert student.name == "bert-layers-1"


def test_the_real_teacher_keeps_its_layers(tmp_path: Path) -> None:
    from distill import packages

    model = "sentence-transformers/all-MiniLM-L6-v2"
    if not packages.is_installed(model):
        pytest.skip(f"the weights are not installed: {packages.PACKAGES[model].install}")
    is_the_same_model_when_saved(students.keep_layers(Encoder.from_pretrained(model), 2), tmp_path / "student")


# Static tables


@pytest.mark.parametrize("kind", ["bert", "mpnet", "qwen", "bert_cls_dense"])
def test_a_static_student_emits_the_teachers_width(tiny_model: Callable[..., Path], tmp_path: Path, kind: str) -> None:
    teacher = Encoder.from_pretrained(tiny_model(kind))
    before = teacher.fingerprint()
    student = students.static(teacher, width=8)
    assert (student.backbone.width, student.width, student.max_length) == (8, teacher.width, UNLIMITED)
    assert len(student.backbone.table) == len(teacher.tokenizer)
    is_the_same_model_when_saved(student, tmp_path / "static")
    assert teacher.fingerprint() == before


def test_at_full_width_a_token_keeps_its_vector(bert: Encoder) -> None:
    """Nothing is lost on all principal directions: one token gives the teacher's vector of it, less the mean."""
    student, vectors = students.static(bert, width=bert.width), bert.encode_vocabulary()
    tokens = bert.tokenizer.convert_tokens_to_ids(["dogs", "bridge", "snow"])
    expected = nn.functional.normalize(vectors[tokens] - vectors.mean(0))
    assert gap(student.encode(["dogs", "bridge", "snow"]), expected) <= TOLERANCE


def test_few_directions_keep_what_they_can(bert: Encoder) -> None:
    vectors = bert.encode_vocabulary()
    centred = nn.functional.normalize(vectors - vectors.mean(0))
    kept = []
    for width in (1, 4, 16):
        student = students.static(bert, width=width, token_vectors=vectors)
        alone = student.head(student.backbone.table).detach()
        kept.append(pairwise_cosine(alone, centred).mean().item())
    assert kept == sorted(kept)
    assert kept[-1] > 0.9


def test_the_same_table_every_time(bert: Encoder) -> None:
    assert students.static(bert, width=8).fingerprint() == students.static(bert, width=8).fingerprint()


@pytest.mark.parametrize("width", [-1, 0, 33])
def test_a_static_student_is_no_wider_than_its_teacher(bert: Encoder, width: int) -> None:
    with pytest.raises(RecipeError, match=rf"has width 1\.\.32, got {width}"):
        students.static(bert, width=width)
    with pytest.raises(RecipeError, match="is static already"):
        students.static(students.static(bert, width=8))


def test_token_weights_are_zipf_or_sif(bert: Encoder) -> None:
    zipf = students.static(bert, width=4).backbone.weights.detach()
    assert (zipf.diff() > 0).all(), "a later token is rarer, and weighs more"
    counted = students.static(bert, width=4, texts=["the the the the dogs", "the bridge"]).backbone.weights.detach()
    the, dogs, flute = bert.tokenizer.convert_tokens_to_ids(["the", "dogs", "flute"])
    assert counted[the] < counted[dogs] < counted[flute]
    size = len(bert.tokenizer)
    assert counted[the] == pytest.approx(3e-4 / (3e-4 + 6 / (7 + size)))  # every count is raised by one


def test_a_static_student_reads_no_special_tokens(bert: Encoder) -> None:
    student = students.static(bert, width=4)
    assert student.tokenize(["Two dogs", ""]).tokens.lengths.tolist() == [2, 0]
    assert student.tokenize(["Two dogs", ""]).empty == [False, True]
    long = student.tokenize([" ".join(TEXTS * 10)])
    assert int(long.tokens.lengths) > 10 * tiny.MAX_LENGTH
    assert long.truncated == [False]


def test_lower_case_goes_into_the_static_tokenizer(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    teacher = Encoder.from_pretrained(tiny_model("bert", layers=2, lowercase=False, do_lower_case=True))
    student = students.static(teacher, width=4)
    expected = teacher.tokenize(["Two DOGS"]).tokens.ids[1:-1]
    assert torch.equal(student.tokenize(["Two DOGS"]).tokens.ids, expected)
    is_the_same_model_when_saved(student, tmp_path / "static")


def test_a_table_learns_its_rows_and_weights(bert: Encoder) -> None:
    student = students.static(bert, width=4).train()
    student(student.tokenize(TEXTS).tokens).sum().backward()
    assert isinstance(student.backbone, StaticTable)
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in student.parameters())


# Other models, and the projection


def test_another_model_of_the_same_width(bert: Encoder, tiny_mpnet: Path, tmp_path: Path) -> None:
    student = students.pretrained(tiny_mpnet, bert)
    assert [type(layer) for layer in student.head] == [Normalize]
    assert gap(student.encode(TEXTS), Encoder.from_pretrained(tiny_mpnet).encode(TEXTS)) <= 1e-6
    is_the_same_model_when_saved(student, tmp_path / "student")


def test_another_model_of_another_width(tiny_mpnet: Path, tiny_bert_cls: Path, tmp_path: Path) -> None:
    teacher = Encoder.from_pretrained(tiny_mpnet)
    student = students.pretrained(
        Encoder.from_pretrained(tiny_bert_cls, max_length=20, compute_dtype="bfloat16"), teacher
    )
    assert [type(layer) for layer in student.head] == [Dense, Dense, Normalize]
    assert (student.width, student.max_length, student.compute_dtype) == (32, 20, "bfloat16")
    student.compute_dtype = "float32"
    is_the_same_model_when_saved(student, tmp_path / "student")


def test_another_model_takes_no_options_that_it_would_drop(tiny_bert_cls: Path, bert: Encoder) -> None:
    with pytest.raises(TypeError, match="max_length"):
        students.pretrained(Encoder.from_pretrained(tiny_bert_cls), bert, max_length=8)


def narrow(teacher: Encoder, folder: Callable[..., Path]) -> Encoder:
    return students.pretrained(folder("bert", layers=2, head=[tiny.dense(tiny.WIDTH, 24, "Identity")]), teacher)


@pytest.mark.parametrize(
    "make",
    [
        narrow,
        lambda teacher, folder: students.keep_layers(teacher, 3, projection=True),
        lambda teacher, folder: students.static(teacher, width=16),
    ],
    ids=["another width", "kept layers", "static"],
)
def test_a_fitted_projection_is_nearer_on_texts_it_has_not_seen(
    bert: Encoder, tiny_model: Callable[..., Path], tmp_path: Path, make: Callable[..., Encoder]
) -> None:
    student, seen, unseen = make(bert, tiny_model), phrases(600), phrases(100, seed=1)
    start = pairwise_cosine(student.encode(unseen), bert.encode(unseen)).mean()
    students.fit_projection(student, seen, bert.encode(seen))
    fitted = pairwise_cosine(student.encode(unseen), bert.encode(unseen)).mean()
    assert fitted > start + 0.02
    assert student.width == bert.width
    is_the_same_model_when_saved(student, tmp_path / "fitted")


def test_the_projection_recovers_a_linear_map(bert: Encoder) -> None:
    student, texts = students.keep_layers(bert, tiny.LAYERS, projection=True), phrases(400)
    turn = torch.linalg.qr(torch.randn(32, 32))[0]
    students.fit_projection(student, texts, bert.encode(texts) @ turn, ridge=0.0)
    assert pairwise_cosine(student.encode(TEXTS), bert.encode(TEXTS) @ turn).min() > 0.9999


def test_a_bias_does_not_stay_behind_the_fit(tiny_model: Callable[..., Path], bert: Encoder) -> None:
    folder = tiny_model("bert", layers=2, head=[tiny.dense(tiny.WIDTH, tiny.WIDTH, "Identity")])
    student, texts = students.pretrained(folder, bert), phrases(200)
    students.fit_projection(student, texts, bert.encode(texts))
    assert not student.head[0].linear.bias.any()


def test_what_no_regression_can_fit_is_refused(tiny_bert_cls: Path, bert: Encoder) -> None:
    texts = phrases(50)
    teacher = Encoder.from_pretrained(tiny_bert_cls)
    student = students.keep_layers(teacher, 1)
    before = student.fingerprint()
    with pytest.raises(RecipeError, match=r"Dense layer with Tanh\(\)"):
        students.fit_projection(student, texts, teacher.encode(texts))
    assert student.fingerprint() == before
    with pytest.raises(RecipeError, match="no Dense layer to fit"):
        students.fit_projection(students.keep_layers(bert, 1), texts, bert.encode(texts))


def test_a_frozen_token_table_is_not_trained(bert: Encoder) -> None:
    student = students.keep_layers(bert, 1)
    students.freeze_token_table(student)
    frozen = {name for name, p in student.named_parameters() if not p.requires_grad and "pooler" not in name}
    assert frozen == {"backbone.model.embeddings.word_embeddings.weight"}
    assert bert.backbone.model.embeddings.word_embeddings.weight.requires_grad
    with pytest.raises(RecipeError, match="static table"):
        students.freeze_token_table(students.static(bert, width=4))


def test_a_student_is_described_in_one_line(bert: Encoder) -> None:
    line = students.describe(students.static(bert, width=4))
    assert line.startswith("bert-static-4: 0.0M parameters, ")
    assert line.endswith("width 32")


def test_the_projection_is_fitted_on_usable_rows_in_their_roles(tiny_model: Callable[..., Path]) -> None:
    teacher = Encoder.from_pretrained(tiny_model("bert", layers=2))
    student = students.keep_layers(teacher, 1, projection=True)
    student.prompts = {"query": "the "}
    texts = [f"{text} {number}" for number in range(6) for text in TEXTS]
    vectors = teacher.encode(texts)
    vectors[9], vectors[19] = float("nan"), 0.0
    students.fit_projection(student, {"query": texts}, vectors, ridge=1e-3)
    by_role = student.head[-2].linear.weight.detach().clone()
    assert by_role.isfinite().all()
    students.fit_projection(student, texts, vectors, ridge=1e-3)
    assert not torch.allclose(by_role, student.head[-2].linear.weight)
