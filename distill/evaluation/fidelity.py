"""How faithful a student is to its teacher: the same texts in both spaces, without labels."""

import torch
from jaxtyping import Float
from torch import Tensor

from distill import metrics
from distill.evaluation.scores import Score, mean_score
from distill.metrics import bootstrap_interval
from distill.similarity import pairwise_cosine


def fidelity(
    student: Float[Tensor, "n d"], teacher: Float[Tensor, "n e"], *, k: int = 10, seed: int = 0
) -> dict[str, Score]:
    """How faithful student vectors are to the teacher's of the same texts, without labels.

    cosine to teacher: of each text to its twin, where widths are equal; neighbour overlap@k: share of the k nearest other
    texts that both spaces agree on; similarity spearman: rank correlation of the cosines of n/2 disjoint random pairs.
    O(n^2 (d + e)).
    """
    scores = {}
    if student.shape[1] == teacher.shape[1]:
        scores["cosine to teacher"] = mean_score(pairwise_cosine(student, teacher))
    if len(student) > k:
        scores[f"neighbour overlap@{k}"] = mean_score(metrics.neighbour_overlap(student, teacher, k))
    if len(student) >= 8:
        first, second = torch.randperm(len(student), generator=torch.Generator().manual_seed(seed))[
            : len(student) // 2 * 2
        ].chunk(2)
        cosines = [pairwise_cosine(vectors[first], vectors[second]) for vectors in (student, teacher)]
        scores["similarity spearman"] = Score(bootstrap_interval(*cosines, statistic=metrics.spearman))
    return scores
