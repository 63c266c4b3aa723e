"""How good a student is: fidelity to its teacher without labels, and STS, retrieval and classification with them.

Every number comes with its bootstrap 95 % interval. Teacher vectors are read from the store, and embedded into it once.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from distill import distributed, metrics
from distill.data import Labelled, Pairs, Retrieval
from distill.embed import embed
from distill.encoder import Encoder
from distill.errors import DataError, RecipeError
from distill.heads import CosineLinear
from distill.metrics import Interval, bootstrap_interval
from distill.similarity import pairwise_cosine, top_k_neighbours
from distill.store import Store, text_keys

Encode = Callable[..., Float[Tensor, "n d"]]


@dataclass(frozen=True, kw_only=True)
class EvaluationData:
    """What to measure on; each part may be absent. Names become the names of the scores.

    `texts` are for fidelity, read in the role `role` ("document", "query"; None: no role).
    """

    texts: Sequence[str] = ()
    role: str | None = None
    pairs: Mapping[str, Pairs] = field(default_factory=dict)
    retrieval: Mapping[str, Retrieval] = field(default_factory=dict)
    labelled: Mapping[str, Labelled] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, task in self.retrieval.items():
            if not any(_judged(task)):
                raise DataError(
                    f"the retrieval task {name or 'given'} has no query with a relevant document (grade > 0)."
                )


@dataclass(frozen=True)
class Score:
    """A number with its interval; `values` are the rows it is the mean of, kept for paired comparison."""

    interval: Interval
    values: Float[Tensor, " n"] | None = None

    def __str__(self) -> str:
        return str(self.interval)


@dataclass(frozen=True)
class Scores:
    """Scores of several systems on the same data: `table[system][metric]`."""

    table: dict[str, dict[str, Score]]
    speeds: dict[str, dict[str, int | float]]

    def difference(self, first: str, second: str, metric: str) -> Interval:
        """The mean of first - second over the rows that both were scored on, with its paired interval."""
        one, two = self.table[first][metric].values, self.table[second][metric].values
        if one is None or two is None:
            raise ValueError(f"{metric} is no mean over rows; there is no paired difference.")
        return bootstrap_interval(one - two)

    def as_json(self) -> dict[str, Any]:
        """Plain JSON; a number that is undefined, as a rank correlation of constants, is null."""
        scores = {
            name: {metric: _finite(asdict(score.interval)) for metric, score in row.items()}
            for name, row in self.table.items()
        }
        return {"scores": scores, "speed": self.speeds}

    def __str__(self) -> str:
        """A table: metrics down, systems across, each value with half the width of its 95 % interval; then size and speed."""
        systems = list(self.table)
        metrics = list(dict.fromkeys(metric for row in self.table.values() for metric in row))
        heads = [name.partition(" -> ") for name in systems]
        lines = [["", *(name for name, _, _ in heads)]]
        lines += [["", *(f"-> {index}" if index else "" for _, _, index in heads)]] if any(h[2] for h in heads) else []
        lines += [[metric, *(_cell(row.get(metric)) for row in self.table.values())] for metric in metrics]
        for metric, show in _SPEED_CELLS.items():
            if self.speeds:
                lines.append([metric, *(show(self.speeds[name]) if name in self.speeds else "" for name in systems)])
        widths = [max(len(line[column]) for line in lines) for column in range(len(systems) + 1)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
        )


_SPEED_CELLS: dict[str, Callable[[dict[str, int | float]], str]] = {
    "parameters": lambda speed: f"{speed['parameters'] / 1e6:,.3g}M",
    "texts/s, one process": lambda speed: f"{speed['texts_per_second']:,.0f}",
}


def _cell(score: Score | None) -> str:
    if score is None:
        return ""
    return f"{score.interval.value:.3f} ±{(score.interval.high - score.interval.low) / 2:.3f}"


def _finite(values: dict[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def evaluate(
    students: Mapping[str, Encoder],
    teacher: Encoder,
    data: EvaluationData,
    *,
    store: str | Path | None = None,
    keep_index: bool = True,
    speed: bool = True,
) -> Scores:
    """Score the teacher and each student on `data`, on all processes; `store` holds the teacher's vectors (embed's default).

    `keep_index` adds a row "NAME -> teacher's index" a student: its queries against the documents that the teacher
    embedded. Cost: one pass of each student over the data, and of the teacher over what is not stored.
    """
    if "teacher" in students or any(" -> " in name for name in students):
        raise RecipeError(f'a student is not named "teacher" nor with an arrow, got {", ".join(students)}.')
    reader = _stored(teacher, store)
    table = {"teacher": _labels_scores(reader, data) | _retrieval_scores(reader, reader, data)}
    for name, student in students.items():
        encode = partial(encode_everywhere, student.to(distributed.device()), progress="student vectors")
        table[name] = (
            _fidelity_scores(encode, reader, data)
            | _labels_scores(encode, data)
            | _retrieval_scores(encode, encode, data)
        )
        if keep_index and data.retrieval:
            table[f"{name} -> teacher's index"] = _retrieval_scores(encode, reader, data)
    return Scores(table, _speeds({"teacher": teacher, **students}, data) if speed else {})


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
        scores["cosine to teacher"] = _mean_score(pairwise_cosine(student, teacher))
    if len(student) > k:
        scores[f"neighbour overlap@{k}"] = _mean_score(metrics.neighbour_overlap(student, teacher, k))
    if len(student) >= 8:
        first, second = torch.randperm(len(student), generator=torch.Generator().manual_seed(seed))[
            : len(student) // 2 * 2
        ].chunk(2)
        cosines = [pairwise_cosine(vectors[first], vectors[second]) for vectors in (student, teacher)]
        scores["similarity spearman"] = Score(bootstrap_interval(*cosines, statistic=metrics.spearman))
    return scores


def retrieval(
    queries: Float[Tensor, "q d"], documents: Float[Tensor, "n d"], data: Retrieval, *, k: int = 10
) -> dict[str, Score]:
    """nDCG@k and recall@k of ranking documents by cosine, over the judged queries."""
    place = {name: number for number, name in enumerate(data.corpus_ids)}
    judged = [number for number, has_relevant in enumerate(_judged(data)) if has_relevant]
    _, ranked = top_k_neighbours(queries[judged], documents, min(k, len(documents)))
    grades = [data.qrels[data.query_ids[number]] for number in judged]
    qrels = [{place[name]: float(grade) for name, grade in found.items()} for found in grades]
    return {
        f"ndcg@{k}": _mean_score(metrics.ndcg_at_k(ranked, qrels, k).values),
        f"recall@{k}": _mean_score(metrics.recall_at_k(ranked, qrels, k).values),
    }


def similarity_pairs(first: Float[Tensor, "n d"], second: Float[Tensor, "n d"], data: Pairs) -> Score:
    """Spearman correlation of cosines with people's scores (STS)."""
    gold = torch.tensor(data.score, dtype=torch.float64)
    return Score(bootstrap_interval(pairwise_cosine(first, second), gold, statistic=metrics.spearman))


def centroid_accuracy(train: Float[Tensor, "n d"], test: Float[Tensor, "m d"], data: Labelled) -> Score:
    """Accuracy on the test texts of a CosineLinear whose proxies are the mean directions of the classes: no training."""
    if data.test is None:
        raise ValueError("centroid_accuracy needs labelled test texts.")
    head = CosineLinear(train.shape[1], len(data.names), sigma=False)
    head.imprint(train, torch.tensor(data.labels))
    logits = head(test)["logits"].detach()
    return _mean_score((logits.argmax(dim=1) == torch.tensor(data.test.labels)).float())


def encode_everywhere(
    encoder: Encoder, texts: Sequence[str], *, role: str | None = None, progress: str | None = None
) -> Float[Tensor, "n d"]:
    """The vectors of `texts` on every process, each of which computes its share."""
    share = distributed.share(len(texts))
    bar = progress if distributed.is_main() else None
    mine = encoder.encode(texts[share.start : share.stop], role=role, progress=bar)
    return distributed.gather_rows(mine.to(encoder.device)).cpu()


def _judged(data: Retrieval) -> list[bool]:
    """Whether a query has anything relevant to find."""
    return [any(grade > 0 for grade in data.qrels.get(query, {}).values()) for query in data.query_ids]


def _fidelity_scores(encode: Encode, teacher: Encode, data: EvaluationData) -> dict[str, Score]:
    texts = list(dict.fromkeys(data.texts))
    return fidelity(encode(texts, role=data.role), teacher(texts, role=data.role)) if texts else {}


def _retrieval_scores(queries: Encode, documents: Encode, data: EvaluationData) -> dict[str, Score]:
    scores: dict[str, Score] = {}
    for name, task in data.retrieval.items():
        found = retrieval(queries(task.queries, role="query"), documents(task.corpus, role="document"), task)
        scores |= {_named(name, metric, data.retrieval): score for metric, score in found.items()}
    return scores


def _labels_scores(encode: Encode, data: EvaluationData) -> dict[str, Score]:
    scores: dict[str, Score] = {}
    for name, pairs in data.pairs.items():
        first, second = encode([*pairs.sentence1, *pairs.sentence2]).chunk(2)
        scores[_named(name, "spearman", data.pairs)] = similarity_pairs(first, second, pairs)
    for name, task in data.labelled.items():
        if task.test is not None:
            scores[_named(name, "accuracy", data.labelled)] = centroid_accuracy(
                encode(task.texts), encode(task.test.texts), task
            )
    return scores


def _named(task: str, metric: str, tasks: Mapping[str, Any]) -> str:
    return metric if len(tasks) == 1 and not task else f"{task} {metric}"


def _mean_score(values: Float[Tensor, " n"]) -> Score:
    values = values.double()
    return Score(bootstrap_interval(values), values)


def _stored(teacher: Encoder, path: str | Path | None) -> Encode:
    """Encode through the store: a text's vector is computed at most once, ever. One that is not finite counts as zero."""
    opened: list[Store] = []  # once: embed hashes the teacher's weights to know its store

    def encode(texts: Sequence[str], *, role: str | None = None) -> Float[Tensor, "n e"]:
        prompt = teacher.prompt(role)
        if not opened or (opened[0].find(text_keys(texts, prompt=prompt)) < 0).any():
            opened[:] = [embed(texts, teacher, path, role=role)]
        vectors = opened[0].vectors(texts, prompt=prompt)
        return torch.where(torch.isfinite(vectors).all(dim=1, keepdim=True), vectors, 0.0)

    return encode


def _speeds(
    encoders: Mapping[str, Encoder], data: EvaluationData, seconds: float = 1.0
) -> dict[str, dict[str, int | float]]:
    """Parameters, bytes, and texts a second of one process, measured on the evaluation's own texts, after a warm-up."""
    texts = list(data.texts) or [text for task in data.retrieval.values() for text in task.corpus]
    texts = texts or [text for task in data.pairs.values() for text in task.sentence1]
    texts = texts or [text for task in data.labelled.values() for text in task.texts]
    if not texts:
        return {}
    rates = {
        name: _rate(encoder, texts, seconds) if distributed.is_main() else 0.0 for name, encoder in encoders.items()
    }
    return {
        name: {
            "parameters": encoder.parameter_count,
            "bytes": 4 * encoder.parameter_count,
            "texts_per_second": distributed.agree(rates[name]),
        }
        for name, encoder in encoders.items()
    }


def _rate(encoder: Encoder, texts: Sequence[str], seconds: float) -> float:
    size, done = 8, 0
    encoder.encode(texts[:size])
    began = time.perf_counter()
    while (spent := time.perf_counter() - began) < seconds:
        encoder.encode([texts[(done + i) % len(texts)] for i in range(size)])
        done, size = done + size, min(2 * size, 2048)
    return done / spent
