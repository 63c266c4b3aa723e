"""The flags --teacher.*, and the model they name."""

from dataclasses import dataclass
from functools import partial
from typing import Literal

from distill import distributed, hub
from distill.config.bounds import at_least
from distill.encoder import Encoder
from distill.errors import RecipeError


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """The model whose vector space the student is to live in."""

    name: str = "sentence-transformers/all-mpnet-base-v2"
    """A local folder or a name on the Hub, whose weights may come from an installed package."""
    revision: str | None = None
    """Branch, tag or commit on the Hub; None: the one pinned on first use."""
    max_length: int | None = 128
    """Tokens a text is cut at; the model's own limit where that is lower."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the teacher's forward pass."""

    def __post_init__(self) -> None:
        at_least(1, "--teacher.max-length", self.max_length)

    def load(self, *, on_device: bool = True, in_roles: bool = True) -> Encoder:
        """The teacher on this process's device, or on the CPU; the main process fetches it first.

        If texts will not be read in their roles, a line says which of its prompts that leaves out.
        """
        distributed.main_first(partial(fetch, self.name, self.revision))
        teacher = Encoder.from_pretrained(self.name, revision=self.revision, compute_dtype=self.compute_dtype)
        teacher.max_length = min(teacher.max_length, self.max_length or teacher.max_length)
        if teacher.max_length <= teacher.special_token_count:
            least = teacher.special_token_count + 1
            raise RecipeError(f"--teacher.max-length is {least} or more for {self.name}, got {self.max_length}.")
        if not in_roles and distributed.is_main() and (line := left_out(teacher)):
            print(line, flush=True)
        return teacher.to(distributed.device()) if on_device else teacher


def left_out(teacher: Encoder) -> str | None:
    """A line on the prompts that a teacher has for roles, if it puts none before a text without a role."""
    names = [name for name, prompt in teacher.prompts.items() if prompt]
    if not names or teacher.prompt(None):
        return None
    return (
        f"{teacher.name} has prompts for {', '.join(names)}, and none by default: training texts are read without one, queries and "
        "documents of an evaluation with theirs. keep_index.py trains with them, too (--sides.query-prompt, --sides.document-prompt)."
    )


def fetch(name: str, revision: str | None) -> None:
    """The model's files, into the cache."""
    hub.resolve_model(name, revision=revision)
