"""Texts cut to a number of tokens before any model reads them."""

import re
from collections.abc import Sequence

from distill.encoder import Encoder
from distill.errors import RecipeError


def truncate_texts(texts: Sequence[str], encoder: Encoder, max_length: int, *, role: str | None = None) -> list[str]:
    """Each text, or as many of its first words as `encoder` reads in `max_length` tokens, prompt and special tokens included.

    A store knows a vector by prompt and text, and its fingerprint holds one max_length. Queries that are to be shorter than
    documents are therefore cut as texts: the vector of a cut text is that text's, for the teacher, the student and the store.
    Whole words, so that their tokens stay what they were; where there is none between spaces that fits, characters.
    RecipeError if the limit is above the encoder's own or leaves no room for a text. Cost: a binary search, so that long
    texts are tokenized some 5 to 15 times.
    """
    prompt = encoder.prompt(role)
    least = int(encoder.tokenize([""], prompt=prompt).tokens.lengths[0]) + 1
    if not least <= max_length <= encoder.max_length:
        raise RecipeError(
            f"{encoder.name} reads {least}..{encoder.max_length} tokens of a text behind the prompt {prompt!r}; it cannot be "
            f"cut at {max_length}. Raise --teacher.max-length for more."
        )
    fit = _fit(texts, encoder, max_length, prompt)
    shorter = iter(
        _truncated([text for text, fits in zip(texts, fit, strict=True) if not fits], encoder, max_length, prompt)
    )
    return [text if fits else next(shorter) for text, fits in zip(texts, fit, strict=True)]


def _truncated(texts: Sequence[str], encoder: Encoder, max_length: int, prompt: str) -> list[str]:
    """By halving, between words; a text whose first word is too long between characters."""
    words = [[match.start() for match in re.finditer(r"\s+", text.rstrip())] for text in texts]
    places = _last_that_fit(texts, words, encoder, max_length, prompt)
    split = [[*range(1, len(text))] if not place else [place] for text, place in zip(texts, places, strict=True)]
    places = _last_that_fit(texts, split, encoder, max_length, prompt)
    return [text[:place] for text, place in zip(texts, places, strict=True)]


def _last_that_fit(
    texts: Sequence[str], places: Sequence[Sequence[int]], encoder: Encoder, max_length: int, prompt: str
) -> list[int]:
    """Of each text's rising places, the last at which it can be cut to fit; 0 if there is none."""
    low, high = [-1] * len(texts), [len(some) for some in places]  # the place at low fits always, that at high never
    while unsure := [i for i in range(len(texts)) if high[i] - low[i] > 1]:
        middle = [(low[i] + high[i]) // 2 for i in unsure]
        parts = [texts[i][: places[i][m]] for i, m in zip(unsure, middle, strict=True)]
        for i, m, fits in zip(unsure, middle, _fit(parts, encoder, max_length, prompt), strict=True):
            (low if fits else high)[i] = m
    return [some[place] if place >= 0 else 0 for some, place in zip(places, low, strict=True)]


def _fit(texts: Sequence[str], encoder: Encoder, max_length: int, prompt: str) -> list[bool]:
    tokenized = encoder.tokenize(texts, prompt=prompt)
    lengths = tokenized.tokens.lengths.tolist()
    return [length <= max_length and not cut for length, cut in zip(lengths, tokenized.truncated, strict=True)]
