"""What a student is called, how large and how fast it is, and how near to the teacher it starts."""

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from distill.encoder import Encoder
from distill.errors import RecipeError
from distill.modules import StaticTable
from distill.quantized import stored, table_tensors
from distill.similarity import pairwise_cosine, usable_rows
from distill.texts import Texts, texts_by_role

MEASURED_SECONDS = 0.5


def describe(
    student: Encoder,
    texts: Texts | None = None,
    vectors: Float[Tensor, "n e"] | None = None,
) -> str:
    """One line: parameters, bytes as stored, and width; with `texts`, texts a second; with the teacher's `vectors`, the mean cosine to it.

    `texts` may be by role, with `vectors` in the same order; vectors that are not finite, or zero, are left out.
    Cost: passes of the student over the texts for half a second, at least one.
    """
    megabytes = f"{stored_bytes(student) / 1e6:.3g} MB"
    facts = [f"{student.parameter_count / 1e6:.1f}M parameters", megabytes, f"width {student.width}"]
    if texts is not None:
        own, speed = _measured(student, texts_by_role(texts))
        facts.append(f"{speed:,.0f} texts/s")
        if vectors is not None:
            if vectors.shape != own.shape:
                raise RecipeError(
                    f"{student.name} gives vectors {tuple(own.shape)}, got teacher vectors {tuple(vectors.shape)}; expected "
                    "one a text, of the student's width."
                )
            good = usable_rows(vectors)
            cosine = pairwise_cosine(own[good], vectors[good].to(own)).mean()
            facts.append(f"cosine to the teacher {cosine:.3f} ({int(good.sum())} texts)")
    return f"{student.name}: {', '.join(facts)}"


def named(student: Encoder, kind: str, teacher: Encoder) -> Encoder:
    student.name = f"{Path(teacher.name).name}-{kind}"
    return student.eval()


def stored_bytes(student: Encoder) -> int:
    """Bytes of the weights in the student's folder: float32, or what a static table is stored as."""
    backbone = student.backbone
    if not isinstance(backbone, StaticTable):
        return sum(parameter.nbytes for parameter in student.parameters())
    table = table_tensors(backbone.folded(), backbone.stored_as).values()
    return sum(t.nbytes for t in table) + sum(stored(p, backbone.stored_as).nbytes for p in student.head.parameters())


def _measured(
    student: Encoder, roles: Sequence[tuple[str | None, Sequence[str]]]
) -> tuple[Float[Tensor, "n width"], float]:
    """Vectors of texts, and texts a second, tokenizing included. A few texts run before the clock does."""
    student.encode(roles[0][1][:8], role=roles[0][0])
    began, passes = time.monotonic(), 0
    while not passes or time.monotonic() - began < MEASURED_SECONDS:
        vectors = torch.cat([student.encode(some, role=role) for role, some in roles])
        passes += 1
    return vectors, passes * len(vectors) / (time.monotonic() - began)
