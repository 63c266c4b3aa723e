"""The last linear layer of a student: the closed-form map from its own space into the teacher's."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from distill.encoder import Encoder
from distill.errors import RecipeError
from distill.heads import Projection
from distill.modules import Dense
from distill.similarity import normalize


@torch.no_grad()
def fit_projection(
    student: Encoder,
    texts: Sequence[str] | Mapping[str, Sequence[str]],
    vectors: Float[Tensor, "n e"],
    *,
    ridge: float | None = None,
) -> None:
    """Set the student's last Dense layer to the ridge regression from its vectors of `texts` to the teacher's `vectors`.

    Closed form over all rows whose vector is finite and not zero; `ridge=None` chooses the penalty on held-out rows.
    `texts` may be by role, with `vectors` in the same order. Cost: one pass of the student.
    """
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
        by_role = texts.items() if isinstance(texts, Mapping) else [(None, texts)]
        inputs = torch.cat([student.encode(some, role=role, progress="projection") for role, some in by_role])
    finally:
        student.head = head
    # Rows enter as directions: the student is compared by cosine, so a long text must not count for more.
    good = vectors.isfinite().all(dim=1) & vectors.any(dim=1)
    last.weight.copy_(Projection.ridge(normalize(inputs[good]), vectors[good], ridge=ridge).weight)
    if last.bias is not None:
        last.bias.zero_()


def last_linear(student: Encoder) -> nn.Linear:
    dense = [layer for layer in student.head if isinstance(layer, Dense)]
    if not dense:
        raise RecipeError(f"{student.name} has no Dense layer to fit; build it with projection=True.")
    return dense[-1].linear
