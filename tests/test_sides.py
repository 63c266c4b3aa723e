"""Queries and documents apart: prompts of their own, and texts cut at a limit of their own."""

from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill import students
from distill.config import SidesConfig
from distill.data import Retrieval
from distill.embed import embed
from distill.encoder import Encoder
from distill.errors import RecipeError
from distill.evaluation import EvaluationData
from distill.store import text_keys
from distill.truncation import truncate_texts


@pytest.fixture(scope="module")
def teacher(tiny_bert: Path) -> Encoder:
    return Encoder.from_pretrained(tiny_bert)


@pytest.fixture
def prompted(tmp_path: Path) -> Encoder:
    return Encoder.from_pretrained(tiny.bert(tmp_path / "prompted", layers=2, prompts={"query": "How do I find "}))


def lengths(encoder: Encoder, texts: list[str], role: str | None = None) -> list[int]:
    return encoder.tokenize(texts, prompt=encoder.prompt(role)).tokens.lengths.tolist()


def test_a_text_cut_between_words_has_the_vector_that_the_encoder_gives_when_it_cuts_there_itself(
    teacher: Encoder,
) -> None:
    short = Encoder(**vars(teacher.parts())).eval()
    short.max_length = 9
    texts = truncate_texts(tiny.SENTENCES, teacher, 9)
    same = torch.tensor(
        [length == own for length, own in zip(lengths(teacher, texts), lengths(short, tiny.SENTENCES), strict=True)]
    )
    assert same.sum() >= 8
    assert (teacher.encode(texts) - short.encode(tiny.SENTENCES))[same].abs().max() < 1e-6
    assert (teacher.encode(texts) - teacher.encode(tiny.SENTENCES))[same].abs().max() > 0.01


def test_short_texts_stay_and_of_long_ones_as_many_words_as_fit(teacher: Encoder) -> None:
    texts = truncate_texts(tiny.SENTENCES, teacher, 12)
    before = lengths(teacher, tiny.SENTENCES)
    assert min(before) <= 12 < max(before)
    for text, whole, count in zip(texts, tiny.SENTENCES, before, strict=True):
        assert (text == whole) == (count <= 12)
        words = text.split()
        assert words == whole.split()[: len(words)]
        assert count <= 12 or lengths(teacher, [" ".join(whole.split()[: len(words) + 1])])[0] > 12


def test_a_text_without_spaces_is_cut_between_characters(teacher: Encoder) -> None:
    [text] = truncate_texts(["x" * 50], teacher, 6)
    assert text == "xxxx"  # between two special tokens


def test_the_prompt_counts(prompted: Encoder) -> None:
    texts = truncate_texts(tiny.SENTENCES, prompted, 12, role="query")
    assert max(lengths(prompted, texts, "query")) == 12
    assert texts != truncate_texts(tiny.SENTENCES, prompted, 12, role="document")


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=80), max_size=5))
def test_whatever_people_write_is_cut_to_a_beginning_that_fits(teacher: Encoder, texts: list[str]) -> None:
    found = truncate_texts(texts, teacher, 6)
    assert all(whole.startswith(text) for text, whole in zip(found, texts, strict=True))
    assert all(length <= 6 for length in lengths(teacher, found))


def test_a_limit_without_room_or_above_the_encoders_is_refused(teacher: Encoder, prompted: Encoder) -> None:
    with pytest.raises(
        RecipeError, match=r"reads 3\.\.64 tokens of a text behind the prompt ''; it cannot be cut at 2"
    ):
        truncate_texts(tiny.SENTENCES, teacher, 2)
    with pytest.raises(RecipeError, match=r"cut at 65\. Raise --teacher.max-length"):
        truncate_texts(tiny.SENTENCES, teacher, 65)
    with pytest.raises(RecipeError, match=r"reads 10\.\.64 tokens .* 'How do I find '"):
        truncate_texts(tiny.SENTENCES, prompted, 6, role="query")


def test_a_static_encoder_cuts_at_its_own_tokens(teacher: Encoder) -> None:
    static = students.static(teacher, width=8)
    texts = truncate_texts(tiny.SENTENCES, static, 5)
    assert max(lengths(static, texts)) == 5
    assert texts[0] == "A man is playing a"


def test_queries_alone_are_cut_in_training_and_evaluation(teacher: Encoder) -> None:
    task = Retrieval(
        corpus_ids=["a"], corpus=tiny.SENTENCES[:1], query_ids=["q"], queries=tiny.SENTENCES[:1], qrels={"q": {"a": 1}}
    )
    texts, data = SidesConfig(query_max_length=6).cut(
        {"document": tiny.SENTENCES, "query": tiny.SENTENCES}, EvaluationData(retrieval={"docs": task}), teacher
    )
    assert texts["document"] == tiny.SENTENCES
    assert texts["query"] == truncate_texts(tiny.SENTENCES, teacher, 6, role="query")
    assert data.retrieval["docs"].queries == texts["query"][:1]
    assert data.retrieval["docs"].corpus == tiny.SENTENCES[:1]
    untouched, _ = SidesConfig().cut({"query": tiny.SENTENCES}, data, teacher)
    assert untouched == {"query": tiny.SENTENCES}


def test_two_limits_live_in_one_store_whose_fingerprint_stays_true(teacher: Encoder, tmp_path: Path) -> None:
    long = tiny.SENTENCES[0]
    [short] = truncate_texts([long], teacher, 6)
    embed([long], teacher, tmp_path / "store", role="document")
    store = embed([short], teacher, tmp_path / "store", role="query")
    assert store.fingerprint["max_length"] == teacher.max_length
    assert (store.find(text_keys([long, short])) >= 0).all()
    assert (store.vectors([long, short]) - teacher.encode([long, short])).abs().max() < 1e-3


def test_prompts_and_limits_that_are_given_are_those_of_the_models(teacher: Encoder) -> None:
    sides = SidesConfig(query_prompt="q: ", student_document_prompt="", student_max_length=20)
    assert (sides.of_teacher(), sides.of_student()) == ({"query": "q: "}, {"document": ""})
    assert (sides.limit(teacher), SidesConfig().limit(teacher)) == (20, 64)
    with pytest.raises(RecipeError, match=r"--sides.student-max-length is 3\.\.64 for .*, got 65"):
        SidesConfig(student_max_length=65).limit(teacher)
    with pytest.raises(RecipeError, match=r"--sides.query-max-length is 1 or more, got 0"):
        SidesConfig(query_max_length=0)
