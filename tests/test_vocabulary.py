"""A vocabulary fitted to a corpus reads what the whole one reads, with dense ids, and saves and loads to the same."""

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from distill import students
from distill.encoder import Encoder
from distill.errors import DataError, RecipeError
from distill.students import Vocabulary, fit_vocabulary

CORPUS = tiny.SENTENCES[:5]
SPECIAL = ["[UNK]", "[PAD]"]
END = "<|end|>"


def wordpiece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    tokenizer.train_from_iterator(tiny.SENTENCES * 3, trainers.WordPieceTrainer(vocab_size=220, special_tokens=SPECIAL))
    return tokenizer


def byte_level_bpe() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=[END], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(tiny.SENTENCES * 3, trainer)
    return tokenizer


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=180, special_tokens=SPECIAL, unk_token="[UNK]", show_progress=False)
    tokenizer.train_from_iterator(tiny.SENTENCES * 3, trainer)
    return tokenizer


BUILD: dict[str, Callable[[], Tokenizer]] = {"WordPiece": wordpiece, "BPE": byte_level_bpe, "Unigram": unigram}


@pytest.fixture(scope="module", params=list(BUILD))
def original(request: pytest.FixtureRequest) -> Tokenizer:
    return BUILD[request.param]()


def read(tokenizer: Tokenizer, text: str) -> list[str]:
    return tokenizer.encode(text, add_special_tokens=False).tokens


def said(tokenizer: Tokenizer, text: str) -> str:
    return tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids)


def ids_are_dense_and_origins_true(vocabulary: Vocabulary, original: Tokenizer) -> None:
    found = vocabulary.tokenizer.get_vocab(with_added_tokens=True)
    assert sorted(found.values()) == list(range(len(vocabulary)))
    for number, origin in enumerate(vocabulary.origins):
        if isinstance(origin, int):
            assert original.id_to_token(origin) == vocabulary.tokenizer.id_to_token(number)
        else:
            assert original.token_to_id(vocabulary.tokenizer.id_to_token(number)) is None


# Tokens left out


def test_every_text_gives_the_same_words_back(original: Tokenizer) -> None:
    fitted = fit_vocabulary(original, CORPUS)
    assert len(fitted) < original.get_vocab_size()
    ids_are_dense_and_origins_true(fitted, original)
    for text in tiny.SENTENCES:
        assert said(fitted.tokenizer, text) == said(original, text)
    unseen = " ".join(tiny.SENTENCES[5:])
    assert read(fitted.tokenizer, unseen) != read(original, unseen), "the test needs tokens that went"


def test_texts_whose_tokens_all_stay_keep_them(original: Tokenizer) -> None:
    fitted = fit_vocabulary(original, CORPUS)
    for text in CORPUS:
        assert read(fitted.tokenizer, text) == read(original, text)


def test_the_most_frequent_tokens_stay_up_to_a_size(original: Tokenizer) -> None:
    texts, least = [*tiny.SENTENCES, *(["The bank raised its rates."] * 9)], len(fit_vocabulary(original, ["e"]))
    fitted = fit_vocabulary(original, texts, size=least + 20)
    assert least + 18 <= len(fitted) <= least + 20
    ids_are_dense_and_origins_true(fitted, original)
    counts = dict.fromkeys(original.get_vocab(), 0)
    for text in texts:
        for token in read(original, text):
            counts[token] += 1
    words = sorted(
        (piece for piece in counts if len(piece) > 3 and piece not in [*SPECIAL, END]), key=lambda p: -counts[p]
    )
    assert fitted.tokenizer.token_to_id(words[0]) is not None
    gone = [piece for piece in words if fitted.tokenizer.token_to_id(piece) is None]
    assert gone
    assert counts[gone[0]] < counts[words[0]]
    assert read(fitted.tokenizer, "The bank") == read(original, "The bank")


def test_a_size_beyond_the_counted_tokens_takes_others_by_their_id(original: Tokenizer) -> None:
    fitted = fit_vocabulary(original, CORPUS, size=10_000)
    assert len(fitted) == original.get_vocab_size()
    assert fitted.origins == tuple(range(len(fitted)))


def test_a_size_below_what_must_stay_is_refused_with_the_least(original: Tokenizer) -> None:
    least = len(fit_vocabulary(original, ["e"]))
    with pytest.raises(
        RecipeError, match=r"of 3 tokens is too small: special tokens and single characters are (\d+)"
    ) as e:
        fit_vocabulary(original, CORPUS, size=3)
    named = int(str(e.value).split("characters are ")[1].split(".")[0])
    assert named <= least
    assert len(fit_vocabulary(original, CORPUS, size=named)) == named
    with pytest.raises(RecipeError, match="too small"):
        fit_vocabulary(original, CORPUS, size=named - 1)


def test_fitting_twice_changes_nothing(original: Tokenizer) -> None:
    once = fit_vocabulary(original, CORPUS)
    again = fit_vocabulary(once.tokenizer, CORPUS)
    assert again.tokenizer.to_str() == once.tokenizer.to_str()
    assert again.origins == tuple(range(len(once)))


def test_saved_and_loaded_it_gives_the_same_ids(original: Tokenizer, tmp_path: Path) -> None:
    fitted = fit_vocabulary(original, CORPUS, words=3).tokenizer
    fitted.save(str(tmp_path / "tokenizer.json"))
    loaded = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in [*tiny.SENTENCES, "ŵ 鬱", "<s> [PAD] <|end|>", ""]:
        assert loaded.encode(text).ids == fitted.encode(text).ids


def test_special_tokens_stay_and_nothing_is_put_around_a_text(original: Tokenizer) -> None:
    fitted = fit_vocabulary(original, CORPUS).tokenizer
    special = [token.content for token in original.get_added_tokens_decoder().values()]
    assert special
    for token in special:
        assert read(fitted, f"dogs {token} run").count(token) == 1
    assert fitted.encode("Two dogs").ids == fitted.encode("Two dogs", add_special_tokens=False).ids


def test_characters_of_other_texts_are_unknown_on_demand() -> None:
    original = wordpiece()
    everything, seen = (fit_vocabulary(original, ["dogs run"], characters=which) for which in ("all", "seen"))
    assert len(seen) < len(everything)
    assert said(seen.tokenizer, "dogs run") == said(original, "dogs run")
    assert "[UNK]" in read(seen.tokenizer, "what")
    assert "[UNK]" not in read(everything.tokenizer, "what")


def test_what_the_teacher_cannot_read_stays_unknown() -> None:
    fitted = fit_vocabulary(wordpiece(), CORPUS).tokenizer
    assert read(fitted, "dogs 鬱") == [*read(fitted, "dogs"), "[UNK]"]


def test_pieces_that_no_text_gives_are_the_last_to_stay() -> None:
    original = wordpiece()
    original.add_special_tokens(["<x>"])
    pieces = [*(f"[unused{n}]" for n in range(30)), *sorted(original.get_vocab())]
    plain = Tokenizer(models.WordPiece({piece: n for n, piece in enumerate(pieces)}, unk_token="[UNK]"))
    plain.normalizer, plain.pre_tokenizer = original.normalizer, original.pre_tokenizer
    fitted = fit_vocabulary(plain, ["dogs"], size=len(pieces))
    assert len(fitted) <= len(pieces) - 30
    assert not [piece for piece in fitted.tokenizer.get_vocab() if "unused" in piece]


def test_added_tokens_keep_ids_behind_the_vocabulary_if_they_are_special_or_used() -> None:
    original = byte_level_bpe()
    original.add_special_tokens(["<|tool|>"])
    original.add_tokens([AddedToken("dogs"), AddedToken("never")])
    fitted = fit_vocabulary(original, CORPUS)
    ids_are_dense_and_origins_true(fitted, original)
    vocabulary = fitted.tokenizer.get_vocab()
    assert {"<|tool|>", "dogs"} <= vocabulary.keys()
    assert "never" not in vocabulary
    assert read(fitted.tokenizer, "Two dogs<|tool|>")[-2:] == ["dogs", "<|tool|>"]


@pytest.mark.parametrize("texts", [[], [""], ["  "]])
def test_an_empty_corpus_is_refused(texts: list[str]) -> None:
    with pytest.raises(DataError, match=f"there are none in {len(texts)} texts"):
        fit_vocabulary(wordpiece(), texts)


def test_a_tokenizer_of_whole_words_is_refused_by_name() -> None:
    with pytest.raises(RecipeError, match=r"this one is WordLevel.*vocabulary=None"):
        fit_vocabulary(Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")), ["b"])


# Any vocabulary, any text

letters = st.text("abc", min_size=1, max_size=4)


@settings(deadline=None, max_examples=200)
@given(
    first=st.sets(letters, max_size=8),
    later=st.sets(letters, max_size=8),
    corpus=st.lists(st.text("abc ", max_size=12), min_size=1, max_size=4),
    words=st.lists(st.text("abc", min_size=1, max_size=6), min_size=1, max_size=20),
    size=st.none() | st.integers(12, 30),
)
def test_no_word_of_a_wordpiece_becomes_unknown(
    first: set[str], later: set[str], corpus: list[str], words: list[str], size: int | None
) -> None:
    pieces = ["[UNK]", *sorted(first), *(f"##{piece}" for piece in sorted(later))]
    original = Tokenizer(models.WordPiece({piece: n for n, piece in enumerate(pieces)}, unk_token="[UNK]"))
    original.pre_tokenizer = pre_tokenizers.Whitespace()
    if not any(text.split() for text in corpus):
        return
    fitted = fit_vocabulary(original, corpus, size=size)
    for word in words:
        assert "[UNK]" in read(original, word) or "[UNK]" not in read(fitted.tokenizer, word)
        if all(fitted.tokenizer.token_to_id(piece) is not None for piece in read(original, word)):
            whole = "[UNK]" not in read(original, word)
            assert not whole or read(fitted.tokenizer, word) == read(original, word)


@pytest.fixture(scope="module")
def pruned(original: Tokenizer) -> Vocabulary:
    return fit_vocabulary(original, CORPUS)


@settings(deadline=None, max_examples=60)
@given(
    text=st.lists(st.sampled_from([*"abcdefghijklmnopqrstuvwxyz ,.?", "the ", " dogs", "Rust", "ing "])).map("".join)
)
def test_any_text_keeps_its_words(text: str, original: Tokenizer, pruned: Vocabulary) -> None:
    if "[UNK]" in read(original, text):
        return
    assert said(pruned.tokenizer, text) == said(original, text)
    if all(pruned.tokenizer.token_to_id(piece) is not None for piece in read(original, text)):
        assert read(pruned.tokenizer, text) == read(original, text)


# Words put in

WORDY = ["the strongholds swim"] * 6 + ["a strongholds, two strongholds dogs"] * 3 + tiny.SENTENCES


def test_frequent_words_become_one_token(original: Tokenizer) -> None:
    assert len(read(original, "the strongholds")) > 4
    fitted = fit_vocabulary(original, WORDY, words=2)
    assert "strongholds" in fitted.words
    ids_are_dense_and_origins_true(fitted, original)
    parts = read(fitted.tokenizer, "the strongholds")
    assert len(parts) == len(read(fitted.tokenizer, "the")) + 1
    assert fitted.origins[fitted.tokenizer.token_to_id(parts[-1])] == "strongholds"
    for text in WORDY:
        assert said(fitted.tokenizer, text) == said(original, text)


def test_words_change_no_other_text_but_those_that_begin_with_them(original: Tokenizer) -> None:
    whole = fit_vocabulary(original, WORDY, size=10_000)
    fitted = fit_vocabulary(original, WORDY, size=10_000, words=2)
    for text in tiny.SENTENCES:
        if not any(word in text for word in fitted.words):
            assert read(fitted.tokenizer, text) == read(whole.tokenizer, text)
    assert said(fitted.tokenizer, "the strongholdses") == said(original, "the strongholdses")


def test_words_count_towards_the_size_and_the_rare_ones_go(original: Tokenizer) -> None:
    least = len(fit_vocabulary(original, ["e"]))
    fitted = fit_vocabulary(original, WORDY, size=least + 6, words=50)
    assert len(fitted) <= least + 6
    assert "strongholds" in fitted.words
    assert len(fitted.words) < 7


def test_a_bpe_that_marks_the_end_of_a_word_has_no_place_for_words() -> None:
    model = models.BPE({"a": 0, "b</w>": 1, "ab</w>": 2}, [("a", "b</w>")], end_of_word_suffix="</w>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    assert len(fit_vocabulary(tokenizer, ["ab"])) == 3
    with pytest.raises(RecipeError, match=r"end-of-word suffix.*words=0"):
        fit_vocabulary(tokenizer, ["ab"], words=2)


# Vectors


def test_vectors_come_from_the_teachers_tokens_and_from_words(tiny_bert: Path) -> None:
    teacher = Encoder.from_pretrained(tiny_bert)
    fitted = students.fit_vocabulary(teacher, WORDY, words=1)
    assert fitted.words == ["strongholds"]
    tokens, words = teacher.encode_vocabulary(), teacher.encode(fitted.words)
    vectors = fitted.vectors(tokens, words)
    for piece in ("dogs", "[UNK]", "##v"):
        row = vectors[fitted.tokenizer.token_to_id(piece)]
        assert torch.equal(row, tokens[teacher.tokenizer.convert_tokens_to_ids(piece)])
    assert torch.equal(vectors[fitted.tokenizer.token_to_id("strongholds")], words[0])
    with pytest.raises(RecipeError, match="has 1 words of its own"):
        fitted.vectors(tokens, torch.zeros(0, 32))
    with pytest.raises(RecipeError, match="Give those of the teacher"):
        fitted.vectors(tokens[:5], words)
