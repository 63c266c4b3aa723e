"""How faithful a student is to its teacher: the same texts in both spaces, without labels."""

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from distill import metrics
from distill.evaluation.scores import Score, Slice, mean_score, rank_score
from distill.similarity import normalize, pairwise_cosine

HEADLINES = ("cosine to teacher", "neighbour overlap@10", "similarity spearman")  # of `fidelity`, at k = 10
FURTHER = ("overlap@10 in teacher's index", "CKA", "effective rank")  # beside them in `fidelity_slices`
FEWEST = 8  # texts for a rank correlation, a CKA, an effective rank


def fidelity(
    student: Float[Tensor, "n d"], teacher: Float[Tensor, "n e"], *, k: int = 10, seed: int = 0
) -> dict[str, Score]:
    """How faithful student vectors are to the teacher's of the same texts, without labels: the three numbers of the table.

    cosine to teacher: of each text to its twin, where widths are equal; neighbour overlap@k: share of the k nearest other
    texts that both spaces agree on; similarity spearman: rank correlation of the cosines of n/2 disjoint random pairs.
    O(n^2 (d + e)).
    """
    rows = _of_rows(student, teacher, k)
    return {name: mean_score(rows[name]) for name in rows if is_headline(name)} | _of_pairs(student, teacher, seed)


def fidelity_slices(
    student: Float[Tensor, "n d"],
    teacher: Float[Tensor, "n e"],
    *,
    token_counts: Int[Tensor, " n"] | None = None,
    k: int = 10,
    seed: int = 0,
) -> list[Slice]:
    """Fidelity in full: on all texts, on quarters of them by length, and on quarters by the teacher's own margin.

    Beside the numbers of `fidelity`: overlap@k in teacher's index, `metrics.index_overlap`; CKA, `metrics.linear_cka`; the
    effective ranks of the student's and the teacher's unit rows, `metrics.effective_rank`. The margin is
    `metrics.neighbour_margin`: where it is small, neighbours are hard to tell apart.
    Neighbours are sought among all texts, so that the means of a slicing, weighted by its texts, are those of all; rank
    correlation, CKA and rank are those of a slice's own texts. O(n^2 (d + e) + n (d + e)^2).
    """
    rows = _of_rows(student, teacher, k)
    slices = [("all", 0.0, 0.0, torch.arange(len(student)))]
    if token_counts is not None:
        slices += [("tokens", *part) for part in _quarters(token_counts.double())]
    if len(teacher) > k:
        slices += [("margin", *part) for part in _quarters(metrics.neighbour_margin(teacher, k).double())]
    found = []
    for by, low, high, chosen in slices:
        scores = {name: mean_score(values[chosen]) for name, values in rows.items()}
        mine, theirs = student[chosen], teacher[chosen]
        scores |= _of_pairs(mine, theirs, seed) | _cka(mine, theirs) | _rank(mine)
        found.append(Slice(by=by, low=low, high=high, texts=len(chosen), scores=scores, teacher=_rank(theirs)))
    return found


def is_headline(metric: str) -> bool:
    """Whether a number of `fidelity_slices` is one of `fidelity`, too."""
    return metric.startswith(("cosine to teacher", "neighbour overlap@", "similarity spearman"))


def _of_rows(student: Tensor, teacher: Tensor, k: int) -> dict[str, Float[Tensor, " n"]]:
    """What each text has a number of its own for."""
    values: dict[str, Float[Tensor, " n"]] = {}
    alike = student.shape[1] == teacher.shape[1]
    if alike:
        values["cosine to teacher"] = pairwise_cosine(student, teacher)
    if len(student) > k:
        values[f"neighbour overlap@{k}"] = metrics.neighbour_overlap(student, teacher, k)
    if alike and len(student) > k:
        values[f"overlap@{k} in teacher's index"] = metrics.index_overlap(student, teacher, k)
    return values


def _of_pairs(student: Tensor, teacher: Tensor, seed: int) -> dict[str, Score]:
    """Whether both order pairs of texts alike: n/2 disjoint random pairs, the same for every student."""
    if len(student) < FEWEST:
        return {}
    order = torch.randperm(len(student), generator=torch.Generator().manual_seed(seed))
    first, second = order[: len(student) // 2 * 2].chunk(2)
    cosines = [pairwise_cosine(vectors[first], vectors[second]) for vectors in (student, teacher)]
    return {"similarity spearman": rank_score(*cosines)}


def _cka(student: Tensor, teacher: Tensor) -> dict[str, Score]:
    return {"CKA": mean_score(metrics.linear_cka_rows(student, teacher))} if len(student) >= FEWEST else {}


def _rank(vectors: Tensor) -> dict[str, Score]:
    enough = len(vectors) >= FEWEST
    return {"effective rank": mean_score(metrics.effective_rank_rows(normalize(vectors)))} if enough else {}


def _quarters(values: Float[Tensor, " n"]) -> Iterator[tuple[float, float, Int[Tensor, " m"]]]:
    """Lowest value, highest value and rows of each quarter; equal values stay together, so that quarters may be uneven or fewer."""
    edges = values.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=values.dtype))
    quarter = torch.bucketize(values, edges)
    for number in quarter.unique():
        rows = (quarter == number).nonzero().squeeze(1)
        yield float(values[rows].min()), float(values[rows].max()), rows
