"""The ways to join the rows of several teachers: each a matrix behind their unit rows, side by side."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from distill.alignment import generalised_procrustes, nearest_rotation, principal_directions
from distill.encoder import Encoder
from distill.errors import RecipeError
from distill.joining.stores import Joined, Sources, read_together, write_joined
from distill.store import Store, text_keys
from distill.texts import Texts, texts_by_role

Method = Literal["procrustes", "concatenate", "gram"]


def concatenate(
    stores: Sequence[Store],
    path: str | Path | None = None,
    *,
    weights: Sequence[float] | None = None,
    width: int | None = None,
    keys: Sequence[np.ndarray] | None = None,
) -> Joined:
    """Unit rows times sqrt(weight), side by side: the cosine of two rows is exactly the weighted mean of the teachers'.

    `width` makes them so many columns whose cosines stand for that mean (`principal_matrix`). `weights` add up to 1 by
    themselves; None: equal. `keys` (n, 2) of each store name its rows of the same n texts (`keys_by_role`); None: the
    stores' own, where the teachers have the same prompts. `path=None`: beside the first store. Memory: O(sum of widths
    squared).
    """
    sources = read_together(stores, weights, keys)
    if width is None:
        return write_joined(sources, path, "concatenate", side_by_side_matrix(sources))
    whole = sum(store.width for store, weight in zip(stores, sources.weights, strict=True) if weight)
    if not 0 < width <= whole:
        raise RecipeError(f"the teachers that count are {whole} wide together: width is 1..{whole}, got {width}.")
    return write_joined(sources, path, "gram average", principal_matrix(sources, width))


def procrustes_mean(
    stores: Sequence[Store],
    path: str | Path | None = None,
    *,
    weights: Sequence[float] | None = None,
    keys: Sequence[np.ndarray] | None = None,
) -> Joined:
    """The weighted mean of the teachers' rows, each teacher turned onto the others by a rotation: the first is not turned.

    The result lives in the first teacher's space, so the index of the first teacher stays. A narrower teacher is turned
    into it without loss; of a wider one the best subspace is kept. Rotations by `generalised_procrustes`.
    """
    sources = read_together(stores, weights, keys)
    return write_joined(sources, path, "procrustes mean", turned_mean_matrix(sources))


def keys_by_role(texts: Texts, teacher: Encoder) -> np.ndarray:
    """Keys (n, 2) of texts under a teacher's own prompts; texts by role, as `match` takes them, in the mapping's order.

    A text in two roles that the first teacher has one prompt for is joined once, in the role that comes first.
    """
    return np.concatenate([text_keys(some, prompt=teacher.prompt(role)) for role, some in texts_by_role(texts)])


def join_stores(
    stores: Sequence[Store],
    method: Method,
    weights: Sequence[float] | None,
    width: int | None,
    keys: Sequence[np.ndarray] | None,
    path: Path | None = None,
) -> Joined:
    """By the name of a method; "gram" is `concatenate` to a width. RecipeError for a width that a method lacks, or has not."""
    if width is not None and method == "procrustes":
        raise RecipeError("a width is of the methods gram and concatenate; procrustes has the first teacher's.")
    if width is None and method == "gram":
        raise RecipeError("the method gram needs a width.")
    if method == "procrustes":
        return procrustes_mean(stores, path, weights=weights, keys=keys)
    return concatenate(stores, path, weights=weights, width=width, keys=keys)


def side_by_side_matrix(sources: Sources) -> Float[Tensor, "w e"]:
    """sqrt(weight) on the diagonal; a teacher of weight 0 has no columns."""
    scale = _lengths(sources).float()
    return torch.diag(scale)[:, scale > 0]


def principal_matrix(sources: Sources, width: int) -> Float[Tensor, "w e"]:
    """Side by side, then the first `width` principal components; on the first teacher's rows where that is its width.

    The weighted mean of the teachers' Gram matrices is the Gram matrix of rows side by side, so its best approximation of a
    rank (Eckart and Young 1936) is that of their PCA about zero. Rows are then stretched to length 1, which makes the
    diagonal right; of cosines, unlike of inner products, the result is near the best and not the best. Columns come by
    falling variance, unless `width` is the first teacher's: then the rows are turned onto its own as well as they can be,
    which no cosine notices and a student that starts from it does.
    """
    moments, first = sources.moments(), sources.stores[0].width
    scale = rearrange(_lengths(sources), "w -> w 1")
    turn = scale * principal_directions(scale * moments * scale.T, width)
    if width == first:
        turn = turn @ nearest_rotation(turn.T @ moments[:, :first])
    return turn.float()


def turned_mean_matrix(sources: Sources) -> Float[Tensor, "w e"]:
    maps = generalised_procrustes(sources.moments(), [store.width for store in sources.stores], sources.weights)
    return torch.cat([weight * turn for weight, turn in zip(sources.weights, maps, strict=True)]).float()


def _lengths(sources: Sources) -> Float[Tensor, " w"]:
    """sqrt(weight) of the teacher of each column."""
    widths = torch.tensor([store.width for store in sources.stores])
    return torch.tensor(sources.weights, dtype=torch.float64).sqrt().repeat_interleave(widths)
