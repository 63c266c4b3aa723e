"""Every loss and head once more: slow, obvious, float64, one row and one column at a time. No code of distill's."""

import bisect
import math

import numpy as np
from torch import Tensor


def unit_rows(matrix: Tensor) -> list[np.ndarray]:
    rows = matrix.detach().double().numpy()
    return [row / np.sqrt(row @ row) if row.any() else row for row in rows]


def softmax(logits: list[float]) -> list[float]:
    largest = max(logits)
    powers = [math.exp(logit - largest) for logit in logits]
    return [power / math.fsum(powers) for power in powers]


def kl(teacher_logits: list[float], student_logits: list[float]) -> float:
    if not teacher_logits:
        return 0.0
    pairs = zip(softmax(teacher_logits), softmax(student_logits), strict=True)
    return math.fsum(p * math.log(p / q) for p, q in pairs if p > 0)


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def cosine_distance(student: Tensor, teacher: Tensor) -> float:
    return mean([1 - float(s @ t) for s, t in zip(unit_rows(student), unit_rows(teacher), strict=True)])


def embedding_mse(student: Tensor, teacher: Tensor) -> float:
    pairs = zip(unit_rows(student), unit_rows(teacher), strict=True)
    return mean([math.fsum((x - y) ** 2 for x, y in zip(s, t, strict=True)) for s, t in pairs])


def _columns(teacher: Tensor, bank: Tensor | None, keys: Tensor | None, bank_keys: Tensor | None) -> tuple[list, list]:
    """Vectors and names of all columns; a column without a key is a text of its own."""
    vectors = unit_rows(teacher) + ([] if bank is None else unit_rows(bank))
    names: list = [f"row {i}" for i in range(len(teacher))] if keys is None else keys.tolist()
    if bank is not None:
        names += [f"bank {j}" for j in range(len(bank))] if bank_keys is None else bank_keys.tolist()
    return vectors, names


def cross_kl(
    student: Tensor,
    teacher: Tensor,
    bank: Tensor | None = None,
    *,
    keys: Tensor | None = None,
    bank_keys: Tensor | None = None,
    temperature: float = 0.05,
    teacher_temperature: float | None = None,
) -> float:
    vectors, names = _columns(teacher, bank, keys, bank_keys)
    rows = []
    for i, (s, t) in enumerate(zip(unit_rows(student), unit_rows(teacher), strict=True)):
        others = [b for b, name in zip(vectors, names, strict=True) if name != names[i]]
        teacher_logits = [float(t @ b) / (teacher_temperature or temperature) for b in others]
        rows.append(kl(teacher_logits, [float(s @ b) / temperature for b in others]))
    return mean(rows)


def cross_contrastive(
    student: Tensor,
    teacher: Tensor,
    bank: Tensor | None = None,
    *,
    keys: Tensor | None = None,
    bank_keys: Tensor | None = None,
    temperature: float = 0.05,
    symmetric: bool = False,
) -> float:
    vectors, names = _columns(teacher, bank, keys, bank_keys)
    students, batch = unit_rows(student), len(student)

    def surprise(query: np.ndarray, candidates: list, i: int) -> float:
        negatives = [c for c, name in zip(candidates, names, strict=False) if name != names[i]]
        return -math.log(softmax([float(query @ c) / temperature for c in [candidates[i], *negatives]])[0])

    forward = mean([surprise(students[i], vectors, i) for i in range(batch)])
    if not symmetric:
        return forward
    return (forward + mean([surprise(vectors[j], students, j) for j in range(batch)])) / 2


def gram_mse(student: Tensor, teacher: Tensor) -> float:
    s, t = unit_rows(student), unit_rows(teacher)
    return mean([float(s[i] @ s[j] - t[i] @ t[j]) ** 2 for i in range(len(s)) for j in range(len(s))])


def similarity_preserving(student: Tensor, teacher: Tensor) -> float:
    grams = []
    for rows in (unit_rows(student), unit_rows(teacher)):
        gram = [[float(a @ b) for b in rows] for a in rows]
        lengths = [math.sqrt(math.fsum(x * x for x in row)) for row in gram]
        grams.append([x / length if length else 0.0 for row, length in zip(gram, lengths, strict=True) for x in row])
    return mean([(x - y) ** 2 for x, y in zip(*grams, strict=True)])


def cka(student: Tensor, teacher: Tensor) -> float:
    """By the definition over rows: the cosine of the two centred Gram matrices."""
    grams = []
    for rows in (unit_rows(student), unit_rows(teacher)):
        centred = [row - sum(rows) / len(rows) for row in rows]
        grams.append([float(a @ b) for a in centred for b in centred])
    s, t = grams
    product, lengths = math.fsum(x * y for x, y in zip(s, t, strict=True)), math.fsum(x * x for x in s)
    lengths *= math.fsum(y * y for y in t)
    return 1 - product / math.sqrt(lengths) if lengths > 1e-24 else 0.0


def cross_mse(
    student: Tensor,
    teacher: Tensor,
    bank: Tensor | None = None,
    *,
    keys: Tensor | None = None,
    bank_keys: Tensor | None = None,
) -> float:
    vectors, _ = _columns(teacher, bank, keys, bank_keys)
    pairs = zip(unit_rows(student), unit_rows(teacher), strict=True)
    return mean([float(s @ b - t @ b) ** 2 for s, t in pairs for b in vectors])


def gram_kl(
    student: Tensor, teacher: Tensor, *, temperature: float = 0.05, teacher_temperature: float | None = None
) -> float:
    s, t, rows = unit_rows(student), unit_rows(teacher), []
    for i in range(len(s)):
        others = [j for j in range(len(s)) if j != i]
        teacher_logits = [float(t[i] @ t[j]) / (teacher_temperature or temperature) for j in others]
        rows.append(kl(teacher_logits, [float(s[i] @ s[j]) / temperature for j in others]))
    return mean(rows)


def cosine_linear(x: Tensor, weight: Tensor, nb_proxy: int, sigma: float, gamma: float = 1.0) -> np.ndarray:
    """CosineLinear with to_reduce=True; with nb_proxy=1 without it too."""
    rows, proxies = unit_rows(x), unit_rows(weight)
    logits = np.zeros((len(rows), len(proxies) // nb_proxy))
    for i, row in enumerate(rows):
        for c in range(logits.shape[1]):
            scores = [float(row @ proxy) for proxy in proxies[c * nb_proxy : (c + 1) * nb_proxy]]
            shares = softmax([gamma * score for score in scores])
            logits[i, c] = sigma * sum(share * score for share, score in zip(shares, scores, strict=True))
    return logits


def _lists(student: Tensor, teacher: Tensor) -> list[tuple[list[float], list[float]]]:
    """Student and teacher scores of each query, without the padding: where the teacher's score is -inf."""
    rows = zip(student.double().tolist(), teacher.double().tolist(), strict=True)
    present = [[(x, y) for x, y in zip(s, t, strict=True) if y > -math.inf] for s, t in rows]
    return [([x for x, _ in pairs], [y for _, y in pairs]) for pairs in present]


def score_kl(
    student: Tensor, teacher: Tensor, *, temperature: float = 1.0, teacher_temperature: float | None = None
) -> float:
    return mean(
        [
            kl([y / (teacher_temperature or temperature) for y in t], [x / temperature for x in s])
            for s, t in _lists(student, teacher)
        ]
    )


def margin_mse(student: Tensor, teacher: Tensor) -> float:
    kept = [i for i in range(len(teacher)) if teacher[i, 0] > -math.inf]
    errors = [
        (s[0] - x - (t[0] - y)) ** 2
        for s, t in _lists(student[kept], teacher[kept])
        for x, y in zip(s[1:], t[1:], strict=True)
    ]
    return mean(errors) if errors else 0.0


def huber(difference: float) -> float:
    return difference**2 / 2 if abs(difference) < 1 else abs(difference) - 0.5


def rkd_distance(student: Tensor, teacher: Tensor) -> float:
    scaled = []
    for rows in (unit_rows(student), unit_rows(teacher)):
        distances = [float(np.sqrt(((a - b) ** 2).sum())) for a in rows for b in rows]
        others = [distance for distance in distances if distance > 0]
        scale = mean(others) if others else 1.0
        scaled.append([distance / scale for distance in distances])
    return mean([huber(s - t) for s, t in zip(*scaled, strict=True)])


def rkd_angle(student: Tensor, teacher: Tensor, *, anchors: int | None = None) -> float:
    def cosines_from(anchor: np.ndarray, rows: list[np.ndarray]) -> np.ndarray:
        spokes = [row - anchor for row in rows]
        directions = np.stack([spoke / np.sqrt(spoke @ spoke) if spoke.any() else spoke for spoke in spokes])
        return directions @ directions.T

    s, t, values = unit_rows(student), unit_rows(teacher), []
    count = min(anchors or 2048, len(s))
    for k in [int(place * len(s) / count) for place in range(count)]:
        difference = np.abs(cosines_from(s[k], s) - cosines_from(t[k], t))
        values.append(float(np.where(difference < 1, difference**2 / 2, difference - 0.5).mean()))
    return mean(values)


def rank_hinge(student: Tensor, teacher: Tensor, *, margin: float = 0.015) -> float:
    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        return float(a.any()) if (a == b).all() else math.fsum(a * b)

    s, t = unit_rows(student), unit_rows(teacher)
    pairs = sorted((cosine(t[i], t[j]), cosine(s[i], s[j])) for i in range(len(s)) for j in range(i + 1, len(s)))
    ours, sums, count = np.array([s_p for _, s_p in pairs]), [], 0
    for t_p, s_p in pairs:
        lower = ours[: bisect.bisect_left(pairs, (t_p, -2.0))]  # pairs below p in the teacher's order
        sums.append(float(np.maximum(0.0, margin - (s_p - lower)).sum()))
        count += len(lower)
    return math.fsum(sums) / count if count else 0.0
