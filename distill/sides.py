"""Queries and documents apart: prompts of their own, and texts cut to a number of tokens before any model reads them."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from distill.config import at_least
from distill.encoder import Encoder
from distill.errors import RecipeError
from distill.evaluation import EvaluationData


@dataclass(frozen=True, kw_only=True)
class Sides:
    """Prompts and limits of queries and documents; by default the models' own and --teacher.max-length."""

    query_prompt: str | None = None
    """Put before each query for the teacher."""
    document_prompt: str | None = None
    """Put before each document for the teacher."""
    query_max_length: int | None = None
    """Cut queries, for both models, to this many of the teacher's tokens."""
    student_query_prompt: str | None = None
    """Put before each query for the student."""
    student_document_prompt: str | None = None
    """Put before each document for the student."""
    student_max_length: int | None = None
    """The student cuts every text to this many of its own tokens."""

    def __post_init__(self) -> None:
        at_least(1, "--sides.query-max-length", self.query_max_length)
        at_least(1, "--sides.student-max-length", self.student_max_length)

    def of_teacher(self) -> dict[str, str]:
        """The teacher's prompts that are given, by role."""
        return _given(query=self.query_prompt, document=self.document_prompt)

    def of_student(self) -> dict[str, str]:
        """The student's prompts that are given, by role."""
        return _given(query=self.student_query_prompt, document=self.student_document_prompt)

    def limit(self, student: Encoder) -> int:
        """The student's max_length: as asked, if that leaves room for a token and is not more than it can read."""
        least = student.special_token_count + 1
        if self.student_max_length is not None and not least <= self.student_max_length <= student.max_length:
            raise RecipeError(
                f"--sides.student-max-length is {least}..{student.max_length} for {student.name}, got {self.student_max_length}."
            )
        return self.student_max_length or student.max_length

    def cut(
        self, texts: Mapping[str, list[str]], data: EvaluationData, teacher: Encoder
    ) -> tuple[dict[str, list[str]], EvaluationData]:
        """Queries at their own limit, in the training texts by role and in the evaluation."""
        if self.query_max_length is None:
            return dict(texts), data
        shorten = partial(cut, encoder=teacher, max_length=self.query_max_length, role="query")
        tasks = {name: replace(task, queries=shorten(task.queries)) for name, task in data.retrieval.items()}
        shorter = {role: shorten(some) if role == "query" else some for role, some in texts.items()}
        return shorter, replace(data, retrieval=tasks)


def cut(texts: Sequence[str], encoder: Encoder, max_length: int, *, role: str | None = None) -> list[str]:
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
    shorter = iter(_cut([text for text, fits in zip(texts, fit, strict=True) if not fits], encoder, max_length, prompt))
    return [text if fits else next(shorter) for text, fits in zip(texts, fit, strict=True)]


def _cut(texts: Sequence[str], encoder: Encoder, max_length: int, prompt: str) -> list[str]:
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


def _given(**prompts: str | None) -> dict[str, str]:
    return {role: prompt for role, prompt in prompts.items() if prompt is not None}
