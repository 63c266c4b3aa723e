"""The flags --sides.*: queries and documents with prompts and limits of their own."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

from distill.config.bounds import at_least
from distill.encoder import Encoder
from distill.errors import RecipeError
from distill.evaluation import EvaluationData
from distill.truncation import truncate_texts


@dataclass(frozen=True, kw_only=True)
class SidesConfig:
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
        shorten = partial(truncate_texts, encoder=teacher, max_length=self.query_max_length, role="query")
        tasks = {name: replace(task, queries=shorten(task.queries)) for name, task in data.retrieval.items()}
        shorter = {role: shorten(some) if role == "query" else some for role, some in texts.items()}
        return shorter, replace(data, retrieval=tasks)


def _given(**prompts: str | None) -> dict[str, str]:
    return {role: prompt for role, prompt in prompts.items() if prompt is not None}
