"""A tokenizer rewritten for a corpus: tokens that it never uses left out, its frequent words put in, ids dense again."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import torch
from jaxtyping import Float
from tokenizers import Tokenizer, normalizers
from torch import Tensor

from distill.encoder import Encoder
from distill.errors import DataError, RecipeError
from distill.students import pieces
from distill.students.pieces import State

Characters = Literal["all", "seen"]


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """A tokenizer, and for each of its ids, 0..n-1, where its vector comes from.

    An int is the teacher's id of the same token; a str is a text whose vector the token takes: a word that was put in.
    """

    tokenizer: Tokenizer
    origins: tuple[int | str, ...]

    def __len__(self) -> int:
        return len(self.origins)

    @property
    def words(self) -> list[str]:
        """The texts of the tokens that the teacher does not have."""
        return list(dict.fromkeys(origin for origin in self.origins if isinstance(origin, str)))

    def vectors(self, tokens: Float[Tensor, "v e"], words: Float[Tensor, "w e"]) -> Float[Tensor, "n e"]:
        """The teacher's vector of each id, from those of its own tokens by its ids, and of `self.words`."""
        place = {word: len(tokens) + number for number, word in enumerate(self.words)}
        rows = [origin if isinstance(origin, int) else place[origin] for origin in self.origins]
        if len(words) != len(place) or max(rows) >= len(tokens) + len(words):
            raise RecipeError(
                f"the vocabulary has {len(place)} words of its own and reads tokens up to "
                f"{max(o for o in self.origins if isinstance(o, int))}, got vectors of {len(words)} words and {len(tokens)} "
                "tokens. Give those of the teacher that the vocabulary was made for."
            )
        return torch.cat([tokens, words.to(tokens)])[rows]


def fit_vocabulary(
    teacher: Encoder | Tokenizer,
    texts: Iterable[str],
    *,
    size: int | None = None,
    words: int = 0,
    characters: Characters = "all",
) -> Vocabulary:
    """The teacher's vocabulary for a corpus: `size` tokens in all, the most frequent; None: those that `texts` use.

    Special tokens and single characters stay, so that every text that the teacher's tokenizer reads is still read
    ("seen": the characters of `texts` only); a text whose tokens all stay keeps them. `words` puts the most frequent
    words that take several tokens in as tokens of their own. WordPiece, BPE and Unigram; RecipeError for others, for a
    size that is too small, and for `words` where the tokenizer has no place for them. Cost: tokenizes `texts` twice.
    """
    texts = list(texts)
    original = bare_tokenizer(teacher) if isinstance(teacher, Encoder) else _bare(teacher)
    state: State = json.loads(original.to_str())
    pieces.require_known(state)
    found = _frequent_words(original, state, texts, words) if words else {}
    tokenizer = pieces.rebuilt(state, [*pieces.ordered(state), *found], found)
    counts, extended = _counts(tokenizer, texts), json.loads(tokenizer.to_str())
    spelled = (
        None if characters == "all" else {*counts, *(part for word in found if counts[word] for part in found[word])}
    )
    unreadable = _unreadable(tokenizer, extended) - counts.keys()
    kept, lacking = pieces.chosen(extended, counts, size, spelled=spelled, unreadable=unreadable)
    new = {piece: _text(original, parts) for piece, parts in found.items()}
    new |= {piece: pieces.bare(state, piece) for piece in lacking}
    tokenizer = pieces.rebuilt(extended, kept, dict.fromkeys(lacking, ()), counts)
    return Vocabulary(tokenizer, _origins(tokenizer, original, new))


def bare_tokenizer(teacher: Encoder) -> Tokenizer:
    """A teacher's tokenizer without padding and truncation, and with the lower case that the teacher makes before it."""
    tokenizer = _bare(teacher.tokenizer.backend_tokenizer)
    if teacher.lowercase:
        before = [tokenizer.normalizer] if tokenizer.normalizer else []
        tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), *before])
    return tokenizer


def _bare(tokenizer: Tokenizer) -> Tokenizer:
    copied = Tokenizer.from_str(tokenizer.to_str())
    copied.no_padding()
    copied.no_truncation()
    return copied


def _encoded(tokenizer: Tokenizer, texts: Sequence[str]) -> Iterator[Any]:
    for start in range(0, len(texts), 4096):
        yield from tokenizer.encode_batch(list(texts[start : start + 4096]), add_special_tokens=False)


def _counts(tokenizer: Tokenizer, texts: Sequence[str]) -> Counter[str]:
    """How often `texts` use each token, by its piece."""
    counts: Counter[str] = Counter()
    for encoding in _encoded(tokenizer, texts):
        counts.update(encoding.tokens)
    if not counts:
        raise DataError(f"a vocabulary is fitted to the tokens of a corpus; there are none in {len(texts)} texts.")
    return counts


def _frequent_words(tokenizer: Tokenizer, state: State, texts: Sequence[str], count: int) -> dict[str, tuple[str, ...]]:
    """The most frequent words that take several tokens: {the piece that one becomes: the tokens that it takes now}."""
    pieces.require_room_for_words(state)
    seen: Counter[tuple[str, ...]] = Counter()
    for encoding in _encoded(tokenizer, texts):
        tokens = zip(encoding.word_ids, encoding.tokens, strict=True)
        by_word = (tuple(token for _, token in word) for _, word in groupby(tokens, key=lambda pair: pair[0]))
        seen.update(parts for parts in by_word if len(parts) > 1)
    known = set(pieces.ordered(state))
    readable = known - {pieces.unknown(state)}
    found: dict[str, tuple[str, ...]] = {}
    for parts in sorted(seen, key=lambda parts: (-seen[parts], parts)):
        piece = pieces.joined(state, parts)
        fits = piece not in known and pieces.bare(state, piece) == piece and readable.issuperset(parts)
        if fits and _text(tokenizer, parts):
            found[piece] = parts
        if len(found) == count:
            break
    return found


def _unreadable(tokenizer: Tokenizer, state: State) -> set[str]:
    """Pieces that no text gives, as BERT's [unused1]: a WordPiece lies within one word."""
    split = tokenizer.pre_tokenizer
    if state["model"]["type"] != "WordPiece" or split is None:
        return set()
    return {piece for piece in pieces.ordered(state) if len(split.pre_tokenize_str(pieces.bare(state, piece))) != 1}


def _text(tokenizer: Tokenizer, parts: Sequence[str]) -> str:
    """The text that tokens stand for, without the space that belongs to some of them."""
    return str(tokenizer.decoder.decode(list(parts)) if tokenizer.decoder else "".join(parts)).strip()


def _origins(tokenizer: Tokenizer, original: Tokenizer, new: dict[str, str]) -> tuple[int | str, ...]:
    ids = tokenizer.get_vocab(with_added_tokens=True)
    by_id = sorted(ids, key=lambda piece: ids[piece])
    found = [new.get(piece, original.token_to_id(piece)) for piece in by_id]
    origins = tuple(origin for origin in found if origin is not None)
    if sorted(ids.values()) != list(range(len(origins))):
        raise RecipeError(
            "this tokenizer cannot be rewritten: its added tokens do not take the ids behind its vocabulary. "
            "Keep the teacher's whole vocabulary (vocabulary=None)."
        )
    return origins
