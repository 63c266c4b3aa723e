"""Several teachers, one target: their stores, of any widths and tokenizers, joined text by text into a store to train on.

    stores = [embed(texts, one, path) for one, path in zip(teachers, paths, strict=True)]
    keys = [keys_by_role(texts, one) for one in teachers]  # each teacher's own prompts are in its keys
    target = procrustes_mean(stores, keys=keys, weights=(2.0, 1.0)).store
    examples = match(texts, student, teachers[0], target)
    run = train(student, examples, target, CosineDistance(), TrainConfig(epochs=10.0), output=output)

    python -m distill.teachers STORE STORE2 --method procrustes --weights 2 1 --output NEW

`several.several` does the same from the texts themselves, and joins vectors of further texts, to be measured on.

procrustes_mean: in the first teacher's space, so that its index stays. concatenate: every cosine is the weighted mean of
the teachers', at the width of all of them. gram_average: nearly so, at a width of your choice; a space of its own.
Any number of rows: two passes over the stores, O((sum of widths)^2) memory. All rows that are written have length 1.
"""

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from distill.alignment import generalised_procrustes, nearest_rotation, principal_directions
from distill.data import load_texts
from distill.encoder import Encoder
from distill.errors import RecipeError, reported
from distill.store import Store, text_keys
from distill.store.joining import Join, Joined, Sources, read_together, write_joined

Method = Literal["procrustes", "concatenate", "gram"]
Texts = Sequence[str] | Mapping[str, Sequence[str]]


def concatenate(
    stores: Sequence[Store],
    path: str | Path | None = None,
    *,
    weights: Sequence[float] | None = None,
    width: int | None = None,
    keys: Sequence[np.ndarray] | None = None,
) -> Joined:
    """Unit rows times sqrt(weight), side by side: the cosine of two rows is exactly the weighted mean of the teachers'.

    `width` reduces them to so many columns by PCA about zero (see `gram_average`). `weights` add up to 1 by themselves;
    None: equal. `keys` (n, 2) of each store name its rows of the same n texts (`keys_by_role`); None: the stores' own,
    where the teachers have the same prompts. `path=None`: beside the first store. Memory: O(sum of widths squared).
    """
    sources = read_together(stores, weights, keys)
    whole = sum(store.width for store, weight in zip(stores, sources.weights, strict=True) if weight)
    if width is None:
        return write_joined(sources, path, "concatenate", lambda: sources.side_by_side, whole)
    if not 0 < width <= whole:
        raise RecipeError(f"the teachers that count are {whole} wide together: width is 1..{whole}, got {width}.")
    return write_joined(sources, path, "gram average", lambda: _by(principal_matrix(sources, width)), width)


def gram_average(
    stores: Sequence[Store],
    path: str | Path | None = None,
    *,
    width: int,
    weights: Sequence[float] | None = None,
    keys: Sequence[np.ndarray] | None = None,
) -> Joined:
    """Vectors of `width` columns whose cosines stand for the weighted mean of the teachers' Gram matrices.

    That mean is the Gram matrix of `concatenate`'s rows, so its best approximation of a rank (Eckart and Young 1936) is that
    of their PCA about zero: this *is* concatenate(width=width), under the name of what it is good for. Rows are then
    stretched to length 1, which makes the diagonal right; of cosines, unlike of inner products, the result is near the
    best and not the best. Columns come by falling variance, unless `width` is the first teacher's: then the rows are
    turned onto its own as well as they can be, which no cosine notices and a student that starts from it does.
    """
    return concatenate(stores, path, weights=weights, width=width, keys=keys)


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
    return write_joined(sources, path, "procrustes mean", lambda: _by(turned_mean_matrix(sources)), stores[0].width)


def keys_by_role(texts: Texts, teacher: Encoder) -> np.ndarray:
    """Keys (n, 2) of texts under a teacher's own prompts; texts by role, as `match` takes them, in the mapping's order.

    A text in two roles that the first teacher has one prompt for is joined once, in the role that comes first.
    """
    by_role = list(texts.items()) if isinstance(texts, Mapping) else [(None, texts)]
    return np.concatenate([text_keys(some, prompt=teacher.prompt(role)) for role, some in by_role])


def join_stores(
    stores: Sequence[Store],
    method: Method,
    weights: Sequence[float] | None,
    width: int | None,
    keys: Sequence[np.ndarray] | None,
    path: Path | None = None,
) -> Joined:
    if method == "procrustes":
        return procrustes_mean(stores, path, weights=weights, keys=keys)
    return concatenate(stores, path, weights=weights, width=width, keys=keys)


def _by(matrix: Float[Tensor, "w e"]) -> Join:
    return lambda units: torch.cat(units, dim=1) @ matrix


def principal_matrix(sources: Sources, width: int) -> Float[Tensor, "w e"]:
    """Side by side, then the first `width` principal components; on the first teacher's rows where that is its width."""
    moments, first = sources.moments(), sources.stores[0].width
    lengths = [
        torch.full((store.width, 1), math.sqrt(w), dtype=torch.float64)
        for store, w in zip(sources.stores, sources.weights, strict=True)
    ]
    scale = torch.cat(lengths)
    turn = scale * principal_directions(scale * moments * scale.T, width)
    if width == first:
        turn = turn @ nearest_rotation(turn.T @ moments[:, :first])
    return turn.float()


def turned_mean_matrix(sources: Sources) -> Float[Tensor, "w e"]:
    maps = generalised_procrustes(sources.moments(), [store.width for store in sources.stores], sources.weights)
    return torch.cat([weight * turn for weight, turn in zip(sources.weights, maps, strict=True)]).float()


def main(arguments: Sequence[str] | None = None) -> int:
    """python -m distill.teachers STORE STORE2 ... --output NEW"""
    return reported(partial(_print_joined, _parser().parse_args(arguments)))


def _print_joined(options: argparse.Namespace) -> int:
    print(_join(options))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m distill.teachers", description="Join the stores of several teachers into one to train on."
    )
    parser.add_argument(
        "stores", nargs="+", type=Path, help="the first one's prompts, and with procrustes its space, stay"
    )
    parser.add_argument("--method", choices=("procrustes", "concatenate", "gram"), default="procrustes")
    parser.add_argument("--weights", nargs="+", type=float, help="one a store; equal if none are given")
    parser.add_argument("--width", type=int, help="of gram, and of concatenate if it is to be reduced")
    parser.add_argument("--output", type=Path, required=True, help="folder of the new store")
    parser.add_argument("--teachers", nargs="+", help="for teachers whose prompts differ: their names, one a store")
    for name in ("texts", "queries", "documents"):
        parser.add_argument(f"--{name}", nargs="+", help="and the texts: JSONL, CSV, TXT, Parquet; .gz")
    parser.add_argument("--column", help="column of the texts")
    return parser


def _join(options: argparse.Namespace) -> Joined:
    stores = [Store.open(path) for path in options.stores]
    if options.width is not None and options.method == "procrustes":
        raise RecipeError("--width is of --method gram and concatenate; procrustes has the first teacher's.")
    if options.width is None and options.method == "gram":
        raise RecipeError("--method gram needs a --width.")
    keys = _named_keys(options, stores)
    return join_stores(stores, options.method, options.weights, options.width, keys, options.output)


def _named_keys(options: argparse.Namespace, stores: Sequence[Store]) -> list[np.ndarray] | None:
    """Keys of the texts that were named, by each teacher's prompts; None if none were."""
    files = {"": options.texts, "query": options.queries, "document": options.documents}
    if not options.teachers and not any(files.values()):
        return None
    if not options.teachers or not any(files.values()) or len(options.teachers) != len(stores):
        raise RecipeError("--teachers, one a store, and --texts, --queries or --documents go together.")
    texts = {role: load_texts(tuple(names), column=options.column).texts for role, names in files.items() if names}
    encoders = [Encoder.from_pretrained(name) for name in options.teachers]
    for store, encoder in zip(stores, encoders, strict=True):
        _refuse_another(store, encoder)
    return [keys_by_role(texts, encoder) for encoder in encoders]


def _refuse_another(store: Store, encoder: Encoder) -> None:
    weights = encoder.fingerprint()["weights"]
    if store.fingerprint.get("weights") != weights:
        raise RecipeError(f"{store.path} is not of {encoder.name}; name the teachers in the order of their stores.")


if __name__ == "__main__":
    sys.exit(main())
