"""Several teachers of other widths and tokenizers: one target to train on, to be measured against, and to be told of."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import runs
import tiny
import torch
from torch import Tensor

from distill.config import JoinConfig, StudentConfig, TeacherConfig, describe_start
from distill.data import Retrieval
from distill.embed import embed
from distill.encoder import Encoder
from distill.errors import DistillError, RecipeError
from distill.evaluation import EvaluationData, evaluate
from distill.joining import several
from distill.similarity import pairwise_cosine
from distill.space import Space
from distill.store import Store
from distill.training import TrainConfig

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
TEXTS = runs.texts(80)
WAYS: dict[str, dict[str, Any]] = {
    "procrustes": {"method": "procrustes", "weights": (2.0, 1.0)},
    "concatenate": {"method": "concatenate", "weights": (1.0, 3.0)},
    "one that does not count": {"method": "concatenate", "weights": (1.0, 0.0)},
    "concatenate, reduced": {"method": "concatenate", "width": 20},
    "concatenate, turned and not reduced": {"method": "concatenate", "width": 56},
    "one that does not count, turned": {"method": "concatenate", "weights": (1.0, 0.0), "width": 32},
    "gram": {"method": "gram", "width": 40},
    "gram, not reduced": {"method": "gram", "width": 56},
}


@pytest.fixture(scope="session")
def narrower(tiny_model: Callable[..., Path]) -> Path:
    """Bytes instead of words, the last token, 24 numbers."""
    return tiny_model("qwen", head=[tiny.dense(tiny.WIDTH, 24, "Identity"), "Normalize"], prompts={"query": "q: "})


@pytest.fixture
def both(tiny_bert: Path, narrower: Path) -> list[Encoder]:
    return [Encoder.from_pretrained(tiny_bert), Encoder.from_pretrained(narrower)]


def unit(rows: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows, dim=1)


# The target


@pytest.mark.parametrize("way", WAYS)
def test_further_texts_are_joined_as_the_stored_ones(both: list[Encoder], tmp_path: Path, way: str) -> None:
    target = several(both, TEXTS[:60], [tmp_path / "a", tmp_path / "b"], **WAYS[way])
    stored = target.joined.store.vectors(TEXTS[:60])
    torch.testing.assert_close(target.encode(TEXTS[:60]), unit(stored), rtol=0, atol=2e-3)
    assert len(target.joined.store) == 60
    cosines = [unit(one.encode(TEXTS)) @ unit(one.encode(TEXTS)).T for one in both]
    mean = sum(share * matrix for share, matrix in zip(target.weights, cosines, strict=True))
    found = target.encode(TEXTS)
    assert torch.isfinite(found).all()
    if way in ("concatenate", "one that does not count"):  # exactly so, on texts that it was not joined for
        torch.testing.assert_close(found @ found.T, mean, rtol=0, atol=5e-3)
    assert len(target.joined.store) == 60, "texts to measure on are nothing to train on"
    assert len(Store.open(tmp_path / "b")) == 80


@pytest.mark.parametrize("way", [{"method": "gram"}, {"method": "procrustes", "width": 7}])
def test_a_width_that_a_method_lacks_or_has_not_is_refused(
    both: list[Encoder], tmp_path: Path, way: dict[str, Any]
) -> None:
    with pytest.raises(RecipeError, match="width"):
        several(both, TEXTS[:20], [tmp_path / "a", tmp_path / "b"], **way)


def test_what_stands_is_read_and_each_role_has_its_own_prompts(both: list[Encoder], tmp_path: Path) -> None:
    texts, paths = {"query": TEXTS[:20], "document": TEXTS[10:40]}, [tmp_path / "a", tmp_path / "b"]
    first = several(both, texts, paths)
    again = several(both, texts, paths)
    assert again.joined.store.path == first.joined.store.path
    assert str(again.joined) == str(first.joined)
    queries, documents = (first.encode(TEXTS[12:14], role=role) for role in ("query", "document"))
    assert (queries - documents).abs().max() > 1e-2, "the second teacher reads a query behind its prompt"
    further = [first.encode(["a text that came later"], role=role) for role in ("query", "document")]
    assert (further[0] - further[1]).abs().max() > 1e-2
    stored = first.joined.store.vectors(TEXTS[30:40], prompt=both[0].prompt("document"))
    torch.testing.assert_close(first.encode(TEXTS[30:40], role="document"), unit(stored), rtol=0, atol=2e-3)


def test_a_text_that_one_teacher_cannot_read_is_nothing(
    both: list[Encoder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = several(both, TEXTS, [tmp_path / "a", tmp_path / "b"])
    compute = both[1].compute
    monkeypatch.setattr(both[1], "compute", lambda tokens: compute(tokens).fill_(torch.nan))
    found = target.encode(["an orchestra of dogs", TEXTS[0]])
    assert not found[0].any()
    assert found[1].norm() == pytest.approx(1, abs=1e-5)


# The flags


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "gram", "width": 8}, "are of --join.teachers, which names none"),
        ({"teachers": ("x", "x")}, "--join.teachers are different ones, got x x"),
        ({"teachers": ("x",), "weights": (1.0,)}, "--join.weights are 2 numbers of 0 or more"),
        ({"teachers": ("x",), "weights": (1.0, -1.0)}, "got 1.0 -1.0"),
        ({"teachers": ("x",), "weights": (0.0, 0.0)}, "one of them above 0"),
        ({"teachers": ("x",), "width": 8}, "procrustes has the first teacher's"),
        ({"teachers": ("x",), "method": "gram"}, "--join.method gram needs a --join.width"),
        ({"teachers": ("x",), "method": "gram", "width": 0}, "--join.width is 1 or more, got 0"),
    ],
)
def test_what_cannot_be_joined_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        JoinConfig(**options)


@pytest.mark.parametrize("name", ["match_embeddings", "match_similarities"])
def test_recipes_refuse_combinations_before_they_load_a_model(name: str) -> None:
    recipe = program(name)
    for options, message in (
        ({"student": StudentConfig(space=8)}, "--join.method gram --join.width"),
        ({"teacher": TeacherConfig(name="absent")}, "got absent in both"),
    ):
        with pytest.raises(RecipeError, match=message):
            recipe.Recipe(data=("absent.txt",), join=JoinConfig(teachers=("absent",)), **options)


def test_teachers_that_are_not_there_or_too_narrow_are_told_before_anything_is_embedded(
    tiny_bert: Path, narrower: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = TeacherConfig(name=str(tiny_bert))
    wide = JoinConfig(teachers=(str(narrower),), method="gram", width=57)
    with pytest.raises(RecipeError, match=r"--join\.width is at most 56, .* got 57"):
        wide.load(config, config.load())
    with pytest.raises(RecipeError, match="pca-24 keeps 24 of 24 columns"):
        JoinConfig(teachers=(str(narrower),)).load(config, config.load(), "pca-24")
    with pytest.raises(DistillError, match="no/such"):
        JoinConfig(teachers=("no/such",)).load(config, config.load())


# The student


def entered(tiny_bert: Path, path: Path, join: JoinConfig) -> Space:
    config = TeacherConfig(name=str(tiny_bert))
    teacher = config.load()
    store = embed(TEXTS, teacher, path)
    return join.enter(Space(teacher, store), join.load(config, teacher), TEXTS, path)


@pytest.mark.parametrize(
    "options",
    [
        {"width": 8},
        {"kind": "tiny", "width": 16},
        {"kind": "layers", "layers": "auto", "depth": 2},
        {"kind": "layers", "layers": (0, 5), "intermediate": 32},
        {"kind": "pretrained", "name": "{cls}"},
    ],
)
@pytest.mark.parametrize("way", ["procrustes", "gram"])
def test_each_kind_of_student_starts_in_the_joined_space(
    tiny_bert: Path, tiny_bert_cls: Path, narrower: Path, tmp_path: Path, way: str, options: dict[str, Any]
) -> None:
    space = entered(tiny_bert, tmp_path / "store", JoinConfig(teachers=(str(narrower),), **WAYS[way]))
    assert space.store.path in tmp_path.glob("store-joined-*")
    named = {name: str(tiny_bert_cls) if value == "{cls}" else value for name, value in options.items()}
    student = StudentConfig(**named).build(space.teacher, space.store, TEXTS, own=space.own)
    assert student.width == space.store.width == (40 if way == "gram" else tiny.WIDTH)
    assert "cosine to the teacher" in describe_start(student, space.teacher, space.store, TEXTS)
    if way == "gram":  # a space that nothing but the fit can lead to
        near = pairwise_cosine(student.encode(TEXTS), space.store.vectors(TEXTS)).mean()
        assert near > 0.25
    student.save_pretrained(tmp_path / "student")
    torch.testing.assert_close(
        Encoder.from_pretrained(tmp_path / "student").encode(TEXTS), student.cpu().encode(TEXTS), rtol=0, atol=1e-6
    )


def test_every_teachers_store_is_kept_as_was_asked_and_the_joined_one_as_float16(
    tiny_bert: Path, narrower: Path, tmp_path: Path
) -> None:
    config, join = TeacherConfig(name=str(tiny_bert)), JoinConfig(teachers=(str(narrower),))
    teacher = config.load()
    others = join.load(config, teacher, "int8")
    store = embed(TEXTS, teacher, tmp_path / "store", store_as="int8")
    space = join.enter(Space(teacher, store), others, TEXTS, tmp_path / "store", "int8")
    assert space.several is not None
    assert [str(Store.open(path).codec.format) for path in space.several.stores] == ["int8", "int8"]
    assert str(space.store.codec.format) == "float16"
    as_they_are = join.enter(Space(teacher, store), others, TEXTS, tmp_path / "store")  # beside the int8 one
    assert as_they_are.several is not None
    assert str(Store.open(as_they_are.several.stores[1]).codec.format) == "float16"


def test_a_space_without_further_teachers_is_as_it_was(tiny_bert: Path, tmp_path: Path) -> None:
    space = entered(tiny_bert, tmp_path / "store", JoinConfig())
    assert space.several is None
    assert space.own is space.store
    assert space.as_json() is None


# The measure


def task() -> Retrieval:
    ids = [str(number) for number in range(len(tiny.SENTENCES))]
    return Retrieval(
        corpus_ids=ids,
        corpus=tiny.SENTENCES,
        query_ids=ids,
        queries=[text[:30] for text in tiny.SENTENCES],
        qrels={name: {name: 1} for name in ids},
    )


@pytest.mark.parametrize("way", ["procrustes", "gram"])
def test_a_student_is_measured_against_the_space_that_it_lives_in(
    tiny_bert: Path, narrower: Path, tmp_path: Path, way: str
) -> None:
    """In a space of its own: the joined vectors. In the first teacher's: that one alone, whose index is to stay."""
    space = entered(tiny_bert, tmp_path / "store", JoinConfig(teachers=(str(narrower),), **WAYS[way]))
    student = StudentConfig(kind="layers", layers=(0, 5)).build(space.teacher, space.store, TEXTS, own=space.own)
    data = EvaluationData(texts=tiny.SENTENCES, retrieval={"": task()})
    scores = evaluate({"student": student}, space.teacher, data, store=space.own.path, several=space.several)
    joined = space.several
    assert joined is not None
    target = joined.encode(tiny.SENTENCES) if way == "gram" else space.teacher.encode(tiny.SENTENCES)
    other = joined.encode(tiny.SENTENCES) if way == "procrustes" else torch.zeros(12, 40)
    expected = float(pairwise_cosine(student.encode(tiny.SENTENCES), target).mean())
    found = scores.table["student"]["cosine to teacher"].interval.value
    assert found == pytest.approx(expected, abs=1e-3)
    assert found != pytest.approx(float(pairwise_cosine(student.encode(tiny.SENTENCES), other).mean()), abs=1e-3)
    assert {"teacher", "student", "student -> teacher's index"} == set(scores.table)
    parameters = [one.parameter_count for one in joined.teachers]
    assert scores.speeds["teacher"]["parameters"] == (sum(parameters) if way == "gram" else parameters[0])


# The recipes


def program(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, RECIPES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("name", "way", "says"),
    [
        ("match_embeddings", "procrustes", "in the first one's own vector space: an index of its vectors stays"),
        ("match_similarities", "gram", "in a space of its own: an index is made by the student itself"),
    ],
)
def test_the_recipes_train_on_several_teachers_and_say_so(
    name: str, way: str, says: str, tiny_bert: Path, narrower: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    recipe = program(name)
    recipe.main(
        recipe.Recipe(
            data=(str(tmp_path / "texts.txt"),),
            teacher=TeacherConfig(name=str(tiny_bert)),
            join=JoinConfig(teachers=(str(narrower),), **WAYS[way]),
            student=StudentConfig(width=8),
            train=TrainConfig(steps=3, batch_size=16),
            store=tmp_path / "store",
            output=tmp_path / "run",
            held_out=20,
        )
    )
    out = capsys.readouterr().out
    assert f"{way} of {tiny_bert} (" in out
    assert "cosines of pairs are off by" in out
    record = json.loads((tmp_path / "run" / "student" / "distill.json").read_text())
    assert record["space"]["teachers"] == [str(tiny_bert), str(narrower)]
    assert record["space"]["method"] == way
    assert says in (tmp_path / "run" / "student" / "README.md").read_text()
    assert Encoder.from_pretrained(tmp_path / "run" / "student").width == record["space"]["width"]
