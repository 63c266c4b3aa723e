"""The texts themselves: twenty of them as a student x teacher matrix, and those whose neighbours a student gets most wrong."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from distill.similarity import cosine_similarity_matrix, normalize, pairwise_cosine, top_k_neighbours

GROUPS, GROUP = 5, 4
MOST_TEXTS = 2000  # that groups are sought among, in (n, n) memory
CASES, SHOWN = 5, 5
CHARACTERS = 240


@dataclass(frozen=True)
class Neighbour:
    """A text that was found, with the cosine it was found by; `shared`: the other one has it among its k nearest, too."""

    text: str
    cosine: float
    shared: bool


@dataclass(frozen=True)
class Case:
    """A text, the share of its k nearest that student and teacher agree on, and the first of each one's neighbours."""

    text: str
    overlap: float
    cosine: float | None
    teacher: list[Neighbour]
    student: list[Neighbour]


@dataclass(frozen=True)
class Closeup:
    """Some texts in both spaces: cosines of student rows with teacher rows, of teacher rows among themselves; the worst cases.

    `student` is None where the widths differ.
    """

    texts: list[str]
    student: Float[Tensor, "m m"] | None
    teacher: Float[Tensor, "m m"]
    worst: list[Case]


def closeup(
    texts: Sequence[str], student: Float[Tensor, "n d"], teacher: Float[Tensor, "n e"], *, k: int = 10
) -> Closeup:
    """The closeup of one student. The texts of the matrix are chosen by the teacher alone: the same for every student.

    Among 2k texts and less there are no worst cases: there chance shares half of the k nearest and more.
    O(n^2 (d + e)), and (n, n) memory of the first 2,000 texts.
    """
    alike = student.shape[1] == teacher.shape[1]
    chosen = close_groups(teacher[:MOST_TEXTS])
    theirs = teacher[chosen]
    return Closeup(
        texts=[shortened(texts[row]) for row in chosen.tolist()],
        student=cosine_similarity_matrix(student[chosen], theirs) if alike else None,
        teacher=cosine_similarity_matrix(theirs, theirs),
        worst=worst_cases(texts, student, teacher, k=k) if len(texts) > 2 * k else [],
    )


def close_groups(vectors: Float[Tensor, "n e"], groups: int = GROUPS, size: int = GROUP) -> Int[Tensor, " m"]:
    """Rows in tight groups that lie far apart, one group after the other; all rows where there are not more than that.

    Each group is a row with its nearest free rows: the one of the highest mean cosine within, less that with rows taken before.
    """
    if len(vectors) <= groups * size:
        return torch.arange(len(vectors))
    cosines = normalize(vectors) @ normalize(vectors).T
    taken: list[int] = []
    for _ in range(groups):
        free = cosines.clone()
        free[:, taken] = -torch.inf
        near, rows = free.topk(size, dim=1)
        merit = near.mean(1) - (cosines[:, taken].mean(1) if taken else 0.0)
        merit[taken] = -torch.inf
        taken += rows[merit.argmax()].tolist()
    return torch.tensor(taken)


def worst_cases(
    texts: Sequence[str], student: Float[Tensor, "n d"], teacher: Float[Tensor, "n e"], *, k: int, count: int = CASES
) -> list[Case]:
    """The texts of which student and teacher agree on the fewest neighbours; of equal ones, those of the lowest cosine.

    Where widths are equal the student searches the teacher's vectors, as it would an index that stays; else its own.
    """
    alike = student.shape[1] == teacher.shape[1]
    theirs = top_k_neighbours(teacher, teacher, k, exclude_self=True)
    mine = top_k_neighbours(student, teacher if alike else student, k, exclude_self=True)
    cosines = pairwise_cosine(student, teacher) if alike else torch.zeros(len(student))
    shared = [set(a) & set(b) for a, b in zip(theirs[1].tolist(), mine[1].tolist(), strict=True)]
    order = sorted(range(len(texts)), key=lambda row: (len(shared[row]), float(cosines[row])))

    def found(by: tuple[Tensor, Tensor], row: int) -> list[Neighbour]:
        pairs = zip(by[0][row, :SHOWN].tolist(), by[1][row, :SHOWN].tolist(), strict=True)
        return [Neighbour(shortened(texts[other]), cosine, other in shared[row]) for cosine, other in pairs]

    return [
        Case(
            text=shortened(texts[row]),
            overlap=len(shared[row]) / k,
            cosine=float(cosines[row]) if alike else None,
            teacher=found(theirs, row),
            student=found(mine, row),
        )
        for row in order[:count]
    ]


def shortened(text: str) -> str:
    """One line of at most 240 characters."""
    line = " ".join(text.split())
    return line if len(line) <= CHARACTERS else line[: CHARACTERS - 1].rstrip() + "…"


def closeup_json(closeups: Mapping[str, Closeup]) -> dict[str, Any]:
    """Plain JSON of several students' closeups: texts, cosines rounded to 4 digits, worst cases by student."""
    first = next(iter(closeups.values()), None)
    if first is None:
        return {}
    matrices = {"teacher": first.teacher} | {name: one.student for name, one in closeups.items()}
    return {
        "texts": first.texts,
        "cosines": {name: _rounded(matrix) for name, matrix in matrices.items() if matrix is not None},
        "worst": {name: [_case(case) for case in one.worst] for name, one in closeups.items()},
    }


def _case(case: Case) -> dict[str, Any]:
    neighbours = {
        side: [vars(one) | {"cosine": round(one.cosine, 4)} for one in found]
        for side, found in (("teacher", case.teacher), ("student", case.student))
    }
    return {"text": case.text, "overlap": case.overlap, "cosine": case.cosine, **neighbours}


def _rounded(matrix: Tensor) -> list[list[float]]:
    return [[round(value, 4) for value in row] for row in matrix.double().tolist()]
