"""A very long text has the tokens it has as a whole, although its beginning alone is read where that is enough."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill import encoder as encoders
from distill.beginnings import CHARACTERS, beginnings
from distill.encoder import Encoder, Tokenized
from distill.modules import StaticTable

LENGTH = 12
PIECES = [
    "bridge",
    "the ",
    " ",
    "      ",
    "\n",
    "\t",
    "\x00",
    "\u0301",
    "Σ",
    "ς ",
    "İ",
    "雪",
    "[SEP]",
    " [MASK]",
    "x" * 101,
    "a.b-c",
    "\u3000",
    "\u00a0",
    "\u200d",
]


@pytest.fixture(scope="module", params=["bert", "lowered", "static", "qwen", "left"])
def encoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    if request.param == "static":
        tokenizer = tiny.wordpiece().backend_tokenizer
        made = Encoder(StaticTable(torch.randn(tokenizer.get_vocab_size(), 4)), tokenizer)
    else:
        kind = "qwen" if request.param == "qwen" else "bert"
        options = {"do_lower_case": True, "lowercase": False} if request.param == "lowered" else {}
        made = Encoder.from_pretrained(getattr(tiny, kind)(tmp_path_factory.mktemp("model"), layers=2, **options))
    if request.param == "left":
        made.tokenizer.truncation_side = "left"
    made.max_length = LENGTH
    return made


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Encoder, list[str]], Tokenized]]:
    """The tokens of texts that are read as a whole."""

    def tokenize(encoder: Encoder, texts: list[str]) -> Tokenized:
        with monkeypatch.context() as patch:
            patch.setattr(encoders, "beginnings", lambda texts, *_: texts)
            return encoder.tokenize(texts, prompt="a ")

    return tokenize


def fields(found: Tokenized) -> tuple[list[int], list[int], list[bool], list[bool]]:
    return found.tokens.ids.tolist(), found.tokens.lengths.tolist(), found.truncated, found.empty


def test_a_beginning_has_the_tokens_of_the_whole_text(
    encoder: Encoder, whole: Callable[[Encoder, list[str]], Tokenized], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distill.beginnings.CHARACTERS", 2)  # so that the last token that counts stands near the cut

    @settings(max_examples=150, deadline=None)
    @given(
        st.lists(st.lists(st.sampled_from(PIECES) | st.characters(codec="utf-8"), max_size=90).map("".join), max_size=4)
    )
    def same(texts: list[str]) -> None:
        found = encoder.tokenize(texts, prompt="a ")
        assert fields(found) == fields(whole(encoder, texts))

    same()


def test_of_a_long_text_a_beginning_is_read(tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, read = Encoder.from_pretrained(tiny_bert), list[int]()
    encoder.max_length, rows = LENGTH, encoder._rows

    def counted(texts: list[str]) -> list[tuple[list[int], bool, bool]]:
        read.extend(map(len, texts))
        return rows(texts)

    monkeypatch.setattr(encoder, "_rows", counted)
    long, blank = "a man and his dog " * 1000, "a man" + " " * 5000 + "runs"
    assert encoder.tokenize([long, "a man", blank]).truncated == [True, False, False]
    assert max(read[:3]) <= CHARACTERS * LENGTH
    assert read[3:] == [len(blank)]


def test_a_text_without_a_space_or_a_tokenizer_of_another_kind_is_left_alone(tiny_bert: Path, tiny_qwen: Path) -> None:
    bert, qwen = (Encoder.from_pretrained(path).tokenizer.backend_tokenizer for path in (tiny_bert, tiny_qwen))
    for texts in (["x" * 500], [" " + "x" * 500]):
        assert beginnings(texts, LENGTH, bert) == texts
    assert beginnings(["a b " * 200], LENGTH, qwen) == ["a b " * 200]
    assert len(beginnings(["a b " * 200], LENGTH, bert)[0]) < 16 * LENGTH
    bert.add_tokens(["New York"])
    assert beginnings(["a b " * 200], LENGTH, bert) == ["a b " * 200]
