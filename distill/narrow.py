"""A narrower space: a teacher's vectors on their first principal directions, and the index that is turned with them.

A student of `narrow` emits d numbers instead of the teacher's e, and is compared with an index that holds d a row. That
index is the teacher's own, turned and cut: no text is embedded again.

    python -m distill.narrow STUDENT --vectors index.npy --output narrow.npy     # an index that you already have
"""

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from distill import distributed, files, metrics
from distill.embed.taking import read_array
from distill.encoder import Encoder
from distill.errors import DataError, IntegrityError, RecipeError, reported
from distill.identity import recognize
from distill.modules import Dense, Normalize, Truncate
from distill.similarity import cosine_similarity_matrix, normalize, usable_rows
from distill.space import Kept, Space
from distill.store import Rows, Store
from distill.store.compression import principal_directions, spread
from distill.store.shards import SHARD_ROWS
from distill.texts import Texts, texts_by_role

NAME = "rotation.safetensors"
BATCH = 4096
MEASURED_ROWS = 2000


def narrow(teacher: Encoder, store: Store, texts: Texts, width: int) -> Space:
    """The teacher cut to `width` numbers a vector, and a store of its turned vectors, STORE/narrow-WIDTH: train on these.

    Directions are the first eigenvectors of the second moments of the stored vectors of `texts` (by role, if they have
    roles). They are computed once, and then read from STORE/rotation.safetensors: an index that was turned stays valid,
    and a smaller width is the beginning of a larger one. Every row of the store is turned, once.
    Cost: one pass over the stored vectors, O(n e^2 + e^3) FLOP, O(e^2) memory. Every process calls it.
    """
    require_narrower(teacher, width)
    path = store.path / NAME
    if not distributed.main_first(path.exists):
        distributed.main_first(partial(_fit, teacher, store, texts, path))
    every = read_directions(path, teacher.width)
    if len(every) < width:
        raise RecipeError(
            f"{path} holds the {len(every)} directions of as many texts, got a width of {width}. Delete it to fit it to more "
            "texts; an index that was turned by it is to be turned again."
        )
    directions = every[:width].contiguous()
    cut = narrow_teacher(teacher, directions)
    turned = narrow_path(store.path, width)
    distributed.main_first(partial(_turn_store, store, cut, directions, turned))
    sample = _sample(teacher, store, texts)
    return Space(cut, Store.open(turned), directions, keeps(sample, directions))


def narrow_path(store: Path, width: int) -> Path:
    """Where the turned rows of a store are."""
    return store / f"narrow-{width}"


def require_narrower(teacher: Encoder, width: int) -> None:
    """RecipeError for a width that no narrower space of this teacher has."""
    if not 1 <= width < teacher.width:
        raise RecipeError(f"a narrower space than {teacher.name}'s has 1..{teacher.width - 1} directions, got {width}.")


def turn(vectors: Float[Tensor, "n e"], directions: Float[Tensor, "d e"]) -> Float[Tensor, "n d"]:
    """Vectors on orthonormal directions, as unit rows in the wider dtype of the two. A row of zeros stays one."""
    dtype = torch.promote_types(vectors.dtype, directions.dtype)
    return normalize(vectors.to(dtype) @ directions.to(dtype).T)


def principal(batches: Iterable[Float[Tensor, "_ e"]]) -> Float[Tensor, "k e"]:
    """All principal directions of unit rows that come in batches, the most important first; k = e, or the rows if they are fewer.

    Eigenvectors of the second moments, without a mean taken off: a cosine is measured from zero, and moving zero would
    change every one. The first d of them lose least of the sum of squared dot products (Eckart and Young 1936).
    """
    moments, rows = torch.zeros(()), 0
    for batch in batches:
        unit = normalize(batch).double()
        moments, rows = moments + unit.T @ unit, rows + len(unit)
    if not rows:
        raise DataError("no stored vector of the texts is finite and not zero: there are no directions in them.")
    return principal_directions(moments, min(rows, len(moments))).T.float().contiguous()


def narrow_teacher(teacher: Encoder, directions: Float[Tensor, "d e"]) -> Encoder:
    """The same teacher (its weights are shared, not copied) with a last Dense layer onto the directions: d numbers a vector.

    An encoder like any other: students are made from it, its fingerprint names the directions, and it embeds new texts.
    """
    onto = Dense(teacher.full_width, directions.shape[0])
    with torch.no_grad():
        onto.linear.weight.zero_()  # what the teacher itself cuts off
        onto.linear.weight[:, : directions.shape[1]] = directions
    whole = [layer for layer in teacher.head if not isinstance(layer, Truncate)]
    added = [onto.to(teacher.device).train(teacher.training), Normalize().train(teacher.training)]
    parts = vars(teacher.parts()) | {"head": [*whole, *added]}
    cut = Encoder(**parts, compute_dtype=teacher.compute_dtype, name=teacher.name, commit=teacher.commit)
    cut.training = cut.head.training = teacher.training  # its parts, which are the teacher's, keep their own modes
    return cut


def keeps(vectors: Float[Tensor, "n e"], directions: Float[Tensor, "d e"]) -> Kept:
    """What directions keep of vectors. O(n^2 (d + e)); it is meant for some thousand rows."""
    (width, of), count = directions.shape, len(vectors)
    inside = normalize(vectors) @ directions.T
    apart = cosine_similarity_matrix(vectors, vectors) - cosine_similarity_matrix(inside, inside)
    error = apart.abs().fill_diagonal_(0.0).double().sum() / max(1, count * (count - 1))
    overlap = metrics.neighbour_overlap(vectors, inside, min(10, count - 1)).mean() if count > 1 else torch.ones(())
    length = inside.double().square().sum(dim=1).mean()
    return Kept(width, of, count, float(length), float(error), float(overlap))


def write_directions(path: Path, directions: Float[Tensor, "d e"]) -> None:
    """A safetensors file that `read_directions` reads."""
    with files.published_file(path) as temporary:
        save_file({"directions": directions.contiguous()}, temporary)


def read_directions(path: Path, width: int | None = None) -> Float[Tensor, "d e"]:
    """Directions from a file, or from the folder of a student. IntegrityError if they are not orthonormal rows of `width`."""
    path = path / NAME if path.is_dir() else path
    if not path.exists():
        raise DataError(f"{path} is not there. A student of a narrower space has it in its folder (--student.space).")
    try:
        with safe_open(path, "pt") as file:
            directions: Tensor = file.get_tensor("directions")
    except (SafetensorError, OSError) as error:
        raise IntegrityError(f"{path} is damaged ({error}). Copy it again from the store or the student.") from error
    whole = directions.ndim == 2 and (directions @ directions.T - torch.eye(len(directions))).abs().max() < 1e-4
    if not whole or width not in (None, directions.shape[1]):
        raise IntegrityError(
            f"{path} holds {tuple(directions.shape)}, expected orthonormal rows{f' of width {width}' if width else ''}. It belongs "
            "to another teacher, or is damaged."
        )
    return directions


def _fit(teacher: Encoder, store: Store, texts: Texts, path: Path) -> None:
    parts = (store.vectors(part, prompt=prompt) for part, prompt in _parts(teacher, texts))
    write_directions(path, principal(vectors[usable_rows(vectors)] for vectors in parts))


def _parts(teacher: Encoder, texts: Texts) -> Iterator[tuple[Sequence[str], str]]:
    """Some texts, and the prompt of their role."""
    for role, some in texts_by_role(texts):
        for start in range(0, len(some), BATCH):
            yield some[start : start + BATCH], teacher.prompt(role)


def _sample(teacher: Encoder, store: Store, texts: Texts) -> Float[Tensor, "n e"]:
    """Vectors of at most 2,000 texts, evenly spaced."""
    roles = texts_by_role(texts)
    everything = [(text, role) for role, some in roles for text in some]
    chosen = [everything[number] for number in spread(len(everything), MEASURED_ROWS)]
    rows = [
        store.vectors([text for text, role in chosen if role == one], prompt=teacher.prompt(one)) for one, _ in roles
    ]
    sample = torch.cat(rows)
    return sample[usable_rows(sample)]


def _turn_store(store: Store, cut: Encoder, directions: Float[Tensor, "d e"], path: Path) -> None:
    """Turn the rows of a store that `path` does not have yet. What a killed call wrote stays."""
    fingerprint = cut.fingerprint()
    recognize(path, cut, fingerprint, store.keys, lambda numbers: turn(store.take(np.array(numbers)), directions))
    with Store.open_or_create(path, fingerprint, cut.width).lock():
        turned = Store.open(path)
        turned.remove_orphans()
        missing = np.flatnonzero(turned.find(store.keys) < 0)
        turned.require_space(len(missing))
        for start in range(0, len(missing), SHARD_ROWS):
            rows = missing[start : start + SHARD_ROWS]
            vectors = torch.cat(
                [turn(store.take(some), directions) for some in np.array_split(rows, -(-len(rows) // BATCH))]
            )
            turned.publish(
                turned.append(Rows(vectors.numpy(), store.keys[rows], store.token_counts[rows], store.flags[rows]))
            )


def main(arguments: Sequence[str] | None = None) -> int:
    """python -m distill.narrow ROTATION --vectors FULL.npy --output CUT.npy"""
    parser = argparse.ArgumentParser(
        prog="python -m distill.narrow",
        description="Turn and cut an index of the teacher's vectors for a narrow student.",
    )
    parser.add_argument("rotation", type=Path, help=f"folder of the student, or its {NAME}")
    parser.add_argument("--vectors", type=Path, required=True, help=".npy of the teacher's vectors (rows, width)")
    parser.add_argument(
        "--output", type=Path, required=True, help=".npy to write: unit rows, in the dtype of the vectors"
    )
    return reported(partial(_turn_index, parser.parse_args(arguments)))


def _turn_index(options: argparse.Namespace) -> int:
    rows, width, bad = turn_file(options.vectors, read_directions(options.rotation), options.output)
    without = f"; {bad:,} of them have no direction: NaN, infinite or zero, as they came" if bad else ""
    print(f"{options.output}: {rows:,} vectors of width {width}{without}")
    return 0


def turn_file(vectors: Path, directions: Float[Tensor, "d e"], output: Path) -> tuple[int, int, int]:
    """Turn a .npy file into another, 4,096 rows at a time; its rows, their width, and how many of them have no direction."""
    source, width = read_array(vectors), directions.shape[1]
    if source.ndim != 2 or source.shape[1] != width:
        raise DataError(
            f"{vectors} holds {source.shape}, expected (rows, {width}): the width of the teacher that was turned."
        )
    shape, bad = (len(source), len(directions)), 0
    with files.published_file(output) as temporary:
        target = np.lib.format.open_memmap(temporary, mode="w+", dtype=source.dtype, shape=shape)
        for start in range(0, len(source), BATCH):
            rows = torch.from_numpy(np.array(source[start : start + BATCH], np.float32))
            bad += int((~rows.isfinite().all(dim=1) | ~rows.any(dim=1)).sum())
            target[start : start + BATCH] = turn(rows, directions).numpy()
        target.flush()
    return *shape, bad


if __name__ == "__main__":
    sys.exit(main())
