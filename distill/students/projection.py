"""The last linear layer of a student: the closed-form map from its own space into the teacher's."""

from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from distill import distributed
from distill.encoder import Encoder
from distill.errors import RecipeError
from distill.heads import Projection
from distill.modules import Dense, Normalize
from distill.similarity import normalize, usable_rows
from distill.texts import Texts, texts_by_role

BATCH = 4096  # texts that are encoded, and whose vectors are read, together

Read = Callable[[Sequence[str], str | None], Tensor]
"""Some texts and their role -> the teacher's vectors of them (n, e), as from a store."""


@torch.no_grad()
def fit_projection(
    student: Encoder,
    texts: Texts,
    vectors: Float[Tensor, "n e"] | Read,
    *,
    ridge: float | None = None,
) -> None:
    """Set the student's last Dense layer to the ridge regression from its vectors of `texts` to the teacher's `vectors`.

    Closed form over all rows whose vector is finite and not zero; `ridge=None` chooses the penalty on held-out rows.
    `texts` may be by role, with `vectors` in the same order. `vectors` may be a function that reads those of 4,096 texts:
    `lambda some, role: store.vectors(some, prompt=teacher.prompt(role))`. Cost: one pass of the student; memory for
    4,096 rows, at most as many held-out ones, and O(d^2 + d * e), however many texts there are.
    """
    if not isinstance(vectors, Tensor) and not callable(vectors):
        raise TypeError(f"fit_projection takes vectors as a tensor or a function, got {type(vectors).__name__}.")
    last, head = last_linear(student), student.head
    place = next(number for number, layer in enumerate(head) if getattr(layer, "linear", None) is last)
    activation = head[place].activation
    if not isinstance(activation, nn.Identity):
        raise RecipeError(
            f"{student.name} ends in a Dense layer with {activation}, which no regression can see through. "
            "Put one without activation behind it (keep_layers: projection=True)."
        )
    student.head = nn.Sequential(*list(head)[:place])
    try:
        solved = Projection.fit_batches(_batches(student, texts, vectors, last.out_features), ridge=ridge)
    finally:
        student.head = head
    last.weight.copy_(solved.weight)
    if last.bias is not None:
        last.bias.zero_()


def last_linear(student: Encoder) -> nn.Linear:
    dense = [layer for layer in student.head if isinstance(layer, Dense)]
    if not dense:
        raise RecipeError(f"{student.name} has no Dense layer to fit; build it with projection=True.")
    return dense[-1].linear


def lead_to(student: Encoder, width: int) -> None:
    """Let a student end in a linear layer to another width, in place of the one it ends in, if it does; `fit_projection` fills it."""
    head, inside = [layer for layer in student.head if isinstance(layer, Dense)], student.full_width
    if head and isinstance(head[-1].activation, nn.Identity):
        inside = head.pop().linear.in_features
    student.head = nn.Sequential(*head, Dense(inside, width).to(student.device), Normalize())


def _batches(student: Encoder, texts: Texts, vectors: Tensor | Read, width: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of the student beside the teacher's, of so many numbers, those that can be used, batch by batch.

    The student's enter as directions: it is compared by cosine, so a long text must not count for more.
    """
    roles = texts_by_role(texts)
    total, seen = sum(len(some) for _, some in roles), 0
    if isinstance(vectors, Tensor) and len(vectors) != total:
        raise RecipeError(f"fit_projection takes one teacher vector a text, got {len(vectors)} for {total} texts.")
    with tqdm(total=total, desc="projection", unit="text", delay=2, disable=distributed.hides_bars()) as bar:
        for role, some in roles:
            for start in range(0, len(some), BATCH):
                batch = some[start : start + BATCH]
                targets = vectors[seen : seen + len(batch)] if isinstance(vectors, Tensor) else vectors(batch, role)
                if targets.shape[1] != width:
                    raise RecipeError(
                        f"{student.name} ends in width {width} and the teacher's vectors have {targets.shape[1]}. Lead it there "
                        f"first: students.lead_to(student, {targets.shape[1]})."
                    )
                good = usable_rows(targets)
                yield normalize(student.encode(batch, role=role))[good], targets[good]
                seen += len(batch)
                bar.update(len(batch))
