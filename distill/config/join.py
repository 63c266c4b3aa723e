"""The flags --join.*: further teachers beside the first, and the space they make with it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from distill import distributed
from distill.config.bounds import at_least
from distill.config.student import StudentConfig
from distill.config.teacher import TeacherConfig
from distill.embed import default_store
from distill.encoder import Encoder
from distill.errors import RecipeError
from distill.joining import Method, several
from distill.space import Space
from distill.store import Format


@dataclass(frozen=True, kw_only=True)
class JoinConfig:
    """Further teachers, whose vectors are joined with those of --teacher into what the student learns."""

    teachers: tuple[str, ...] = ()
    """Folders or names of further teachers, of any width and tokenizer; none: --teacher alone."""
    method: Method = "procrustes"
    """procrustes: a mean in the space of --teacher, whose index stays; concatenate: side by side, a space of its own; gram: the same in --join.width numbers."""
    weights: tuple[float, ...] = ()
    """One weight for each teacher, that of --teacher first. None given: equal."""
    width: int | None = None
    """Width of the joined vectors: needed by gram, optional for concatenate."""

    def __post_init__(self) -> None:
        if not self.teachers and (self.method, self.weights, self.width) != ("procrustes", (), None):
            raise RecipeError(
                "--join.method, --join.weights and --join.width are of --join.teachers, which names none."
            )
        if len(set(self.teachers)) < len(self.teachers):
            raise RecipeError(f"--join.teachers are different ones, got {' '.join(self.teachers)}.")
        good = all(0 <= weight < math.inf for weight in self.weights) and sum(self.weights) > 0
        if self.weights and not (good and len(self.weights) == 1 + len(self.teachers)):
            raise RecipeError(
                f"--join.weights are {1 + len(self.teachers)} numbers of 0 or more, one of them above 0: that of --teacher, then "
                f"those of --join.teachers; got {' '.join(map(str, self.weights))}."
            )
        if self.method == "procrustes" and self.width is not None:
            raise RecipeError(
                "--join.width is of --join.method gram and concatenate; procrustes has the first teacher's."
            )
        if self.method == "gram" and self.width is None:
            raise RecipeError("--join.method gram needs a --join.width.")
        at_least(1, "--join.width", self.width)

    def check(self, teacher: TeacherConfig, student: StudentConfig, *, plan: bool = False) -> None:
        """RecipeError for what does not go together with other flags: before any weight is loaded."""
        if self.teachers and student.space is not None:
            raise RecipeError(
                "--student.space is a part of one teacher's space, and --join.teachers names more; for a narrow space of several "
                "give --join.method gram --join.width."
            )
        if self.teachers and plan:
            raise RecipeError(
                "--plan is of a run with one teacher: leave out --join.teachers, and plan each by itself."
            )
        if teacher.name in self.teachers:
            raise RecipeError(f"--join.teachers names those beside --teacher.name, got {teacher.name} in both.")

    def load(self, first: TeacherConfig, teacher: Encoder, store_as: str | None = None) -> list[Encoder]:
        """The further teachers, with the max_length and precision of the first.

        RecipeError for a width that they do not reach, and for a `store_as` of more columns than one of them has.
        """
        others = [replace(first, name=name, revision=None).load() for name in self.teachers]
        for one in others:
            Format.parse(store_as or "float16").columns(one.width)
        weights = self.weights or (1.0,) * (1 + len(others))
        whole = sum(one.width for one, weight in zip([teacher, *others], weights, strict=True) if weight)
        if self.width is not None and self.width > whole:
            raise RecipeError(
                f"--join.width is at most {whole}, what the teachers that count have together; got {self.width}."
            )
        return others

    def enter(
        self,
        space: Space,
        others: Sequence[Encoder],
        texts: list[str] | Mapping[str, list[str]],
        store: Path | None,
        store_as: str | None = None,
    ) -> Space:
        """The space of all teachers, and the store of their joined vectors, made beside that of the first; `space` without others.

        Vectors of the others go into the cache or, where a `store` is named for those of the first, beside it; new stores of
        them are `store_as`, that of the joined ones float16.
        """
        if not others:
            return space
        paths = [store and store.with_name(f"{store.name}-{default_store(other, store_as).name}") for other in others]
        joined = several(
            [space.teacher, *others],
            texts,
            [space.store.path, *paths],
            method=self.method,
            weights=self.weights or None,
            width=self.width,
            store_as=store_as,
        )
        if distributed.is_main():
            print(f"{joined}\n{joined.joined}", flush=True)
        return Space(space.teacher, joined.joined.store, several=joined)
