"""Cosines between rows: of twins, of every student with every teacher, of queries with their nearest neighbours.

Rows of any length go in; norms and sums are float32 whatever comes in (float64 stays float64), inside autocast too.
"""

from typing import Literal

import torch
from einops import rearrange, reduce
from jaxtyping import Bool, Float, Int
from torch import Tensor


def cosine_similarity_matrix(
    student: Float[Tensor, "b d"], teacher: Float[Tensor, "n d"], *, method: Literal["matmul", "broadcast"] = "matmul"
) -> Float[Tensor, "b n"]:
    """The cosine of every student row with every teacher row.

    Equals `normalize(student) @ normalize(teacher).T`. A zero row has cosine 0 with everything, and gradient 0.
    "matmul" costs 2bnd FLOP and (b, n) memory. "broadcast" multiplies (b, 1, d) by (1, n, d) and sums the last axis:
    the same numbers from (b, n, d) memory, 3 GiB at b = n = 1024, d = 768. It is for reading and checking.
    """
    check_widths("cosine_similarity_matrix", student, teacher)
    rows, columns = normalize(student), normalize(teacher)
    if method == "broadcast":
        return reduce(rearrange(rows, "b d -> b 1 d") * rearrange(columns, "n d -> 1 n d"), "b n d -> b n", "sum")
    if method != "matmul":
        raise ValueError(f'cosine_similarity_matrix knows method "matmul" and "broadcast", got {method!r}.')
    return _products(rows, columns)


def pairwise_cosine(a: Float[Tensor, "b d"], b: Float[Tensor, "b d"]) -> Float[Tensor, "b"]:
    """The cosine of each row with its twin: the diagonal of the matrix, at O(b * d)."""
    check_pairs("pairwise_cosine", a, b)
    check_widths("pairwise_cosine", a, b)
    return (normalize(a) * normalize(b)).sum(-1)


def normalize(x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
    """Rows of length 1, in float32 (float64 stays float64); a zero row stays zero and gets gradient 0, not NaN.

    Equals `x / x.norm(dim=-1, keepdim=True)`. Rows are first divided by their largest entry, so that the squares of
    very small or very large rows neither vanish nor overflow; F.normalize in fp16 clamps its norm at 1e-12, which is 0.
    """
    scaled, _, is_zero = _by_largest(x)
    return scaled / torch.linalg.vector_norm(scaled, dim=-1, keepdim=True).masked_fill(is_zero, 1.0)


def row_lengths(x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows 1"]:
    """What `normalize` divides each row by: 0 for a row that it takes for zero."""
    scaled, largest, is_zero = _by_largest(x)
    return (largest * torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)).masked_fill(is_zero, 0.0)


def _by_largest(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows over their largest entry, that entry, and whether the row is zero."""
    wide = x if x.dtype == torch.float64 else x.float()
    largest = wide.detach().abs().amax(-1, keepdim=True)
    is_zero = largest < torch.finfo(wide.dtype).tiny
    return (wide / largest.masked_fill(is_zero, 1.0)).masked_fill(is_zero, 0.0), largest, is_zero


@torch.no_grad()
def top_k_neighbours(
    queries: Float[Tensor, "q d"],
    corpus: Float[Tensor, "n d"],
    k: int,
    *,
    exclude_self: bool = False,
    chunk: int | None = None,
) -> tuple[Float[Tensor, "q k"], Int[Tensor, "q k"]]:
    """The k corpus rows of the highest cosine for every query: (scores, indices), best first, ties by lower index.

    Equals a stable descending sort of each row of the cosine matrix, cut at k. `exclude_self` leaves corpus row i out
    of query i, for a corpus searched with itself. Costs 2qnd FLOP; `chunk` query rows are scored at a time, by default
    as many as keep that piece of the matrix under 64 MB.
    """
    check_widths("top_k_neighbours", queries, corpus)
    _check_search(queries, corpus, k, exclude_self, chunk)
    chunk = chunk or max(1, 2**24 // len(corpus))
    unit, columns, found = normalize(queries), normalize(corpus), []
    for start in range(0, max(1, len(queries)), chunk):  # no queries have one empty piece
        scores = _products(unit[start : start + chunk], columns)
        if exclude_self:
            scores.diagonal(start).fill_(-torch.inf)
        found.append(_stable_top_k(scores, k))
    return torch.cat([scores for scores, _ in found]), torch.cat([indices for _, indices in found])


def _products(rows: Float[Tensor, "b d"], columns: Float[Tensor, "n d"]) -> Float[Tensor, "b n"]:
    dtype = torch.promote_types(rows.dtype, columns.dtype)
    with torch.autocast(rows.device.type, enabled=False):  # it would multiply in 16 bits
        return rows.to(dtype) @ columns.to(dtype).T


def _stable_top_k(scores: Float[Tensor, "q n"], k: int) -> tuple[Float[Tensor, "q k"], Int[Tensor, "q k"]]:
    """torch.topk breaks ties as it likes: where the k-th score is followed by an equal one, the choice is made again."""
    best, indices = scores.topk(min(k + 1, scores.shape[1]))
    indices = indices[:, :k].sort(dim=-1).values
    tied = (best[:, k - 1 : k] == best[:, k:]).any(-1)
    if tied.any():
        indices[tied] = _first_of_equals(scores[tied], best[tied, k - 1 : k], k)
    ordered, order = scores.gather(1, indices).sort(dim=-1, descending=True, stable=True)
    return ordered, indices.gather(1, order)


def _first_of_equals(scores: Float[Tensor, "q n"], last: Float[Tensor, "q 1"], k: int) -> Int[Tensor, "q k"]:
    """Rising indices of the scores above the k-th, `last`, and of the first of those that equal it."""
    above, level = scores > last, scores == last
    room = k - above.sum(-1, keepdim=True)
    keep = above | (level & (level.cumsum(-1, dtype=torch.int32) <= room))
    return rearrange(keep.nonzero()[:, 1], "(q k) -> q k", k=k)


def _check_search(queries: Tensor, corpus: Tensor, k: int, exclude_self: bool, chunk: int | None) -> None:
    if exclude_self and len(queries) != len(corpus):
        raise ValueError(
            f"top_k_neighbours(exclude_self=True) takes query i for corpus row i, got {len(queries)} queries and "
            f"{len(corpus)} corpus rows. Search the corpus with itself, or leave exclude_self off."
        )
    if not 1 <= k <= len(corpus) - exclude_self:
        raise ValueError(f"top_k_neighbours needs 1 <= k <= {len(corpus) - exclude_self} corpus rows, got k={k}.")
    if chunk is not None and chunk < 1:
        raise ValueError(f"top_k_neighbours scores at least one query at a time, got chunk={chunk}. None chooses.")
    if not (queries.isfinite().all() and corpus.isfinite().all()):
        raise ValueError("top_k_neighbours got vectors with NaN or infinite entries: they have no order. Remove them.")


def usable_rows(vectors: Float[Tensor, "n e"]) -> Bool[Tensor, " n"]:
    """Rows that are finite and not zero."""
    return vectors.isfinite().all(dim=1) & vectors.any(dim=1)


def evenly_spaced(count: int, most: int) -> list[int]:
    """Numbers of at most `most` of `count` rows, evenly spaced: sorted ones are sampled from end to end."""
    chosen = min(count, most)
    return [place * count // chosen for place in range(chosen)]


def check_widths(caller: str, student: Tensor, teacher: Tensor) -> None:
    """Two matrices of one width, or a message that shows both and the way out."""
    _check_matrices(caller, student, teacher)
    if student.shape[-1] != teacher.shape[-1]:
        raise ValueError(
            f"{caller} compares vectors of one width, got student {tuple(student.shape)} and teacher "
            f"{tuple(teacher.shape)}. Lead the student to width {teacher.shape[-1]}: an Encoder by students.lead_to(encoder, "
            f"{teacher.shape[-1]}), vectors in a loop of your own by torch.nn.Linear({student.shape[-1]}, {teacher.shape[-1]}). Or "
            "use gram_mse or gram_kl, which allow different widths."
        )


def check_pairs(caller: str, student: Tensor, teacher: Tensor) -> None:
    """Two matrices with as many rows: (b, d) beside (1, d) would broadcast silently."""
    _check_matrices(caller, student, teacher)
    if len(student) != len(teacher):
        raise ValueError(
            f"{caller} pairs row i of the student with row i of the teacher, got student {tuple(student.shape)} and "
            f"teacher {tuple(teacher.shape)}. Give both the same texts, in the same order."
        )


def check_bank(caller: str, teacher: Tensor, bank: Tensor) -> None:
    """Further rows of the teacher's space, where the teacher's are."""
    check_matrix(caller, bank, "bank")
    check_device(caller, "bank", bank, teacher)
    if bank.shape[-1] != teacher.shape[-1]:
        raise ValueError(
            f"{caller} takes a bank of the teacher's vectors, got bank {tuple(bank.shape)} beside teacher "
            f"{tuple(teacher.shape)}, of another width. Give vectors of one teacher, cut alike."
        )


def check_device(caller: str, role: str, tensor: Tensor, other: Tensor) -> None:
    """One device for all: a custom operator asks nobody, and computes with memory that nobody wrote."""
    if tensor.device != other.device:
        raise ValueError(
            f"{caller} computes on one device, got {role} on {tensor.device} and other tensors on {other.device}. "
            f'Give {role}.to("{other.device}").'
        )


def check_matrix(caller: str, matrix: Tensor, role: str) -> None:
    """Rows of floating point numbers."""
    check_tensor(caller, matrix, role)
    if not (matrix.is_floating_point() and matrix.shape[-1:] != (0,)):
        raise ValueError(
            f"{caller} takes {role} as vectors of floating point numbers, got {matrix.dtype} {tuple(matrix.shape)}."
        )
    if matrix.ndim != 2:
        raise ValueError(f"{caller} expects {role} as rows of vectors (rows, width), got shape {tuple(matrix.shape)}.")


def check_tensor(caller: str, value: object, role: str) -> None:
    """TypeError for what is no tensor, as the arrays that SentenceTransformer.encode gives unless it is told otherwise."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{caller} takes {role} as a torch.Tensor, got {type(value).__module__}.{type(value).__name__}. "
            "Give torch.as_tensor(...)."
        )


def _check_matrices(caller: str, student: Tensor, teacher: Tensor) -> None:
    check_matrix(caller, student, "student")
    check_matrix(caller, teacher, "teacher")
    check_device(caller, "teacher", teacher, student)
