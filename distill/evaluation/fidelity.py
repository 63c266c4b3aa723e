"""How faithful a student is to its teacher: the same texts in both spaces, without labels."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from distill import metrics
from distill.evaluation.scores import Score, Slice, mean_scores, rank_score
from distill.similarity import check_pairs, normalize, pairwise_cosine, top_k_neighbours

HEADLINES = ("cosine to teacher", "neighbour overlap@10", "similarity spearman")  # of `fidelity`, at k = 10
FURTHER = ("overlap@10 in teacher's index", "CKA", "effective rank")  # beside them in `fidelity_slices`
FEWEST = 8  # texts for a rank correlation, a CKA, an effective rank


def fidelity(
    student: Float[Tensor, "n d"], teacher: Float[Tensor, "n e"], *, k: int = 10, seed: int = 0
) -> dict[str, Score]:
    """How faithful student vectors are to the teacher's of the same texts, without labels: the three numbers of the table.

    cosine to teacher: of each text to its twin, where widths are equal; neighbour overlap@k: share of the k nearest other
    texts that both spaces agree on, of more than 2k texts; similarity spearman: rank correlation of the cosines of n/2
    disjoint random pairs.
    O(n^2 (d + e)).
    """
    rows = Reference(teacher, k=k).rows(student)
    return mean_scores({name: rows[name] for name in rows if is_headline(name)}) | _of_pairs(student, teacher, seed)


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
    return Reference(teacher, token_counts, k=k).slices(student, seed=seed)


def is_headline(metric: str) -> bool:
    """Whether a number of `fidelity_slices` is one of `fidelity`, too."""
    return metric.startswith(("cosine to teacher", "neighbour overlap@", "similarity spearman"))


@dataclass(frozen=True, eq=False)
class Reference:
    """The teacher's vectors of some texts, and what they say without any student: computed once, for all that are compared."""

    vectors: Float[Tensor, "n e"]
    token_counts: Int[Tensor, " n"] | None = None
    k: int = 10

    def slices(self, student: Float[Tensor, "n d"], *, seed: int = 0) -> list[Slice]:
        """`fidelity_slices` of a student."""
        rows, found = self.rows(student), []
        for (by, low, high, chosen), rank in zip(self._parts, self._ranks, strict=True):
            mine, theirs = student[chosen], self.vectors[chosen]
            by_row = {name: values[chosen] for name, values in rows.items()}
            means = mean_scores(by_row | _cka(mine, theirs) | _rank(mine))
            scores = {name: means[name] for name in rows} | _of_pairs(mine, theirs, seed) | means
            found.append(Slice(by=by, low=low, high=high, texts=len(chosen), scores=scores, teacher=rank))
        return found

    def rows(self, student: Float[Tensor, "n d"]) -> dict[str, Float[Tensor, " n"]]:
        """What each text has a number of its own for."""
        check_pairs("fidelity", student, self.vectors)
        values: dict[str, Float[Tensor, " n"]] = {}
        alike = student.shape[1] == self.vectors.shape[1]
        if alike:
            values["cosine to teacher"] = pairwise_cosine(student, self.vectors)
        if self._has_neighbours:
            _, near = top_k_neighbours(student, student, self.k, exclude_self=True)
            values[f"neighbour overlap@{self.k}"] = metrics.shared(near, self._neighbours[1])
        if alike and self._has_neighbours:
            _, near = top_k_neighbours(student, self.vectors, self.k, exclude_self=True)
            values[f"overlap@{self.k} in teacher's index"] = metrics.shared(near, self._neighbours[1])
        return values

    @property
    def _has_neighbours(self) -> bool:
        """Whether there are texts enough: among 2k and less, chance shares half of the k nearest and more."""
        return len(self.vectors) > 2 * self.k

    @cached_property
    def _neighbours(self) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
        return top_k_neighbours(self.vectors, self.vectors, self.k, exclude_self=True)

    @cached_property
    def _parts(self) -> list[tuple[str, float, float, Int[Tensor, " m"]]]:
        """What the texts of a slice have in common, between which bounds, and their numbers."""
        parts = [("all", 0.0, 0.0, torch.arange(len(self.vectors)))]
        if self.token_counts is not None:
            parts += [("tokens", *part) for part in _quarters(self.token_counts.double())]
        if self._has_neighbours:
            nearest = self._neighbours[0]
            parts += [("margin", *part) for part in _quarters((nearest[:, 0] - nearest[:, -1]).double())]
        return parts

    @cached_property
    def _ranks(self) -> list[dict[str, Score]]:
        """The teacher's own effective rank in each slice."""
        return [mean_scores(_rank(self.vectors[chosen])) for *_, chosen in self._parts]


def _of_pairs(student: Tensor, teacher: Tensor, seed: int) -> dict[str, Score]:
    """Whether both order pairs of texts alike: n/2 disjoint random pairs, the same for every student."""
    if len(student) < FEWEST:
        return {}
    order = torch.randperm(len(student), generator=torch.Generator().manual_seed(seed))
    first, second = order[: len(student) // 2 * 2].chunk(2)
    cosines = [pairwise_cosine(vectors[first], vectors[second]) for vectors in (student, teacher)]
    return {"similarity spearman": rank_score(*cosines)}


def _cka(student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
    return {"CKA": metrics.linear_cka_rows(student, teacher)} if len(student) >= FEWEST else {}


def _rank(vectors: Tensor) -> dict[str, Tensor]:
    return {"effective rank": metrics.effective_rank_rows(normalize(vectors))} if len(vectors) >= FEWEST else {}


def _quarters(values: Float[Tensor, " n"]) -> Iterator[tuple[float, float, Int[Tensor, " m"]]]:
    """Lowest value, highest value and rows of each quarter; equal values stay together, so that quarters may be uneven or fewer."""
    edges = values.quantile(values.new_tensor([0.25, 0.5, 0.75]))
    quarter = torch.bucketize(values, edges)
    for number in quarter.unique():
        rows = (quarter == number).nonzero().squeeze(1)
        yield float(values[rows].min()), float(values[rows].max()), rows
