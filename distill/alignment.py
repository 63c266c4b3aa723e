"""One space turned onto another: principal directions and Procrustes rotations, from second moments alone.

Moments are X'X of rows X: they have a size of their own, whatever the number of rows.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

MOST_ROUNDS = 500  # of turning each space once; a round that gains nothing ends it before


def principal_directions(moments: Float[Tensor, "e e"], components: int) -> Float[Tensor, "e k"]:
    """The eigenvectors of moments with the largest eigenvalues, each with its largest entry positive."""
    directions = torch.linalg.eigh(moments).eigenvectors.flip(1)[:, :components]
    largest = directions.gather(0, directions.abs().argmax(dim=0, keepdim=True))
    return directions * torch.where(largest < 0, -1.0, 1.0)


def nearest_rotation(cross: Float[Tensor, "d e"]) -> Float[Tensor, "d e"]:
    """R with orthonormal columns or rows that has the largest trace(R' cross): U V' of its singular value decomposition."""
    left, _, right = torch.linalg.svd(cross.double(), full_matrices=False)
    return left @ right


def generalised_procrustes(
    moments: Float[Tensor, "w w"],
    widths: Sequence[int],
    weights: Sequence[float],
    *,
    tolerance: float = 1e-8,
) -> list[Float[Tensor, "_ e"]]:
    """A map (width, e) for each teacher that turns its rows onto all the others', the first one's being the identity.

    `moments` are X'X of the teachers' rows X side by side. The maps, with orthonormal columns or rows, raise the weighted
    sum over pairs of teachers of trace((X_s R_s)' X_t R_t), one teacher at a time in closed form (Schonemann 1966), until a
    round gains less than `tolerance` of it. For widths up to e that is the least sum of squared distances; a wider
    teacher is compared with rows that are padded with zeros (Gower 1975). Rows enter through `moments` alone.
    """
    blocks = [list(rows.split(list(widths), dim=1)) for rows in moments.double().split(list(widths), dim=0)]
    pull = [weights[0] or 1.0, *weights[1:]]  # the first is what others are turned to, even if it does not count
    maps = [torch.eye(widths[0], dtype=torch.float64), *(nearest_rotation(row[0]) for row in blocks[1:])]
    before = -math.inf
    for _ in range(MOST_ROUNDS):
        for s in range(1, len(maps)):
            others = [t for t in range(len(maps)) if t != s and pull[t]]
            maps[s] = nearest_rotation(torch.stack([pull[t] * blocks[s][t] @ maps[t] for t in others]).sum(0))
        together = _agreement(blocks, maps, pull)
        if together - before <= tolerance * abs(together):
            break
        before = together
    return maps


def _agreement(blocks: list[list[Tensor]], maps: list[Tensor], pull: Sequence[float]) -> float:
    """Weighted sum over pairs of teachers of the trace of their turned rows' products."""
    pairs = [(s, t) for s in range(len(maps)) for t in range(s)]
    return sum(pull[s] * pull[t] * float((maps[s] * (blocks[s][t] @ maps[t])).sum()) for s, t in pairs)
