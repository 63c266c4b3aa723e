"""Teacher and students on the same data: which vectors go where."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from distill import distributed
from distill.data import Labelled, Pairs, Retrieval
from distill.embed import embed
from distill.encoder import Encoder, require_encoder
from distill.errors import DataError, RecipeError
from distill.evaluation.closeup import Closeup, closeup
from distill.evaluation.fidelity import Reference, is_headline
from distill.evaluation.precisions import Precision, stored_scores
from distill.evaluation.scores import INDEX, MIXED, Score, Scores, Slice, Stored
from distill.evaluation.speed import speeds
from distill.evaluation.tasks import centroid_accuracy, judged, mixed_index, retrieval, similarity_pairs
from distill.joining import Several
from distill.store import Store, text_keys
from distill.texts import distinct

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
    precisions: Sequence[Precision] = ()
    """Of stored vectors, to be measured beside float32."""
    seen_in_training: Mapping[str, int] = field(default_factory=dict)
    """How many texts of which kind are among the training texts, where there are any; the scores carry it along."""

    def __post_init__(self) -> None:
        for name, task in self.retrieval.items():
            if not any(judged(task)):
                raise DataError(
                    f"the retrieval task {name or 'given'} has no query with a relevant document (grade > 0)."
                )

    def by_role(self) -> dict[str | None, list[str]]:
        """Every text that a model is to read, once, by the role it is read in."""
        parts = [(self.role, self.texts)]
        parts += [(None, [*pairs.sentence1, *pairs.sentence2]) for pairs in self.pairs.values()]
        for task in self.retrieval.values():
            parts += [("document", task.corpus), ("query", task.queries)]
        for labelled in self.labelled.values():
            parts += [(None, [*labelled.texts, *(labelled.test.texts if labelled.test else [])])]
        roles = dict.fromkeys(role for role, _ in parts)
        return {role: list(dict.fromkeys(t for name, some in parts if name == role for t in some)) for role in roles}

    def among(self, texts: Iterable[str]) -> dict[str, int]:
        """How many different sentences, queries and labelled test texts are among `texts`, as far as any are.

        Documents are not counted: those of an index that exists are trained on by design.
        """
        known = set(texts)
        parts: dict[str, Iterable[str]] = {
            f"sentences of {name}": [*pairs.sentence1, *pairs.sentence2] for name, pairs in self.pairs.items()
        }
        parts |= {f"queries of {name}": task.queries for name, task in self.retrieval.items()}
        parts |= {f"test texts of {name}": one.test.texts for name, one in self.labelled.items() if one.test}
        counts = {name: len(known.intersection(some)) for name, some in parts.items()}
        return {name: count for name, count in counts.items() if count}

    def sources(self) -> dict[str, str]:
        """Where each labelled task comes from, as far as it is known, data sets on the Hub with their commits; and what was left out."""
        found = {name: pairs.source for name, pairs in self.pairs.items()}
        found |= {name: task.source for name, task in self.retrieval.items()}
        for name, labelled in self.labelled.items():
            found[name] = labelled.sources()
        return {name: source for name, source in found.items() if source}

    def any_texts(self) -> list[str]:
        """Texts to measure speed on: those for fidelity, or the first task's."""
        texts = list(self.texts) or [text for task in self.retrieval.values() for text in task.corpus]
        texts = texts or [text for task in self.pairs.values() for text in task.sentence1]
        return texts or [text for task in self.labelled.values() for text in task.texts]


def evaluate(
    students: Mapping[str, Encoder],
    teacher: Encoder,
    data: EvaluationData,
    *,
    store: str | Path | None = None,
    several: Several | None = None,
    keep_index: bool = True,
    mixed_index: Collection[str] = (),
    speed: bool = True,
) -> Scores:
    """Score the teacher and each student on `data`, on all processes; `store` holds the teacher's vectors (embed's default).

    `keep_index` adds a row "NAME -> teacher's index" a student: its queries against the documents that the teacher
    embedded. The students named in `mixed_index` get a row "NAME -> mixed index", too: the teacher embedded half of the
    documents, the student the other half, as those that are added later. `several` teachers that were joined in a space of
    their own take the place of `teacher`, the first of them, with their joined vectors; in the first one's space, that one
    is what a student is compared with, and its index is searched. Cost: one pass of each student over the data, and
    of the teacher over what is not stored.
    """
    if isinstance(students, Encoder):
        raise TypeError('evaluate takes students by name, {"student": student}, got an Encoder.')
    for name, model in [("the teacher", teacher), *((f"student {name!r}", one) for name, one in students.items())]:
        require_encoder(model, f"evaluate: {name}")
    if "teacher" in students or any(" -> " in name for name in students):
        raise RecipeError(f'a student is not named "teacher" nor with an arrow, got {", ".join(students)}.')
    joined = None if several is None or several.keeps_index else several
    reader = _stored(teacher, store) if joined is None else _once(joined.encode)
    texts = distinct(data.texts)
    reference = _reference(texts, reader, teacher, data.role) if texts else None
    table = {"teacher": _labels_scores(reader, data) | _retrieval_scores(reader, [reader], data)}
    slices: dict[str, list[Slice]] = {}
    closeups: dict[str, Closeup] = {}
    stored = _stored_scores("teacher", reader, data)
    for name, student in students.items():
        encode = _once(partial(encode_everywhere, student.to(distributed.device()), progress="student vectors"))
        if reference:
            mine = encode(texts, role=data.role)
            slices[name] = reference.slices(mine)
            closeups[name] = closeup(texts, mine, reader(texts, role=data.role))
        table[name] = (
            _headlines(slices.get(name, [])) | _labels_scores(encode, data) | _retrieval_scores(encode, [encode], data)
        )
        if keep_index and data.retrieval:
            table[name + INDEX] = _retrieval_scores(encode, [reader], data)
        if name in mixed_index and data.retrieval:
            table[name + MIXED] = _retrieval_scores(encode, [reader, encode], data)
        stored += _stored_scores(name, encode, data)
    everyone = {"teacher": teacher if joined is None else joined.teachers, **students}
    measured = speeds(everyone, data.any_texts()) if speed and data.any_texts() else {}
    return Scores(table, measured, slices, closeups, stored, data.sources(), dict(data.seen_in_training))


def task_scores(
    *, pairs: Collection[str] = (), retrieval: Collection[str] = (), labelled: Collection[str] = ()
) -> list[str]:
    """The names that `evaluate` gives the scores of such tasks."""
    names = [_named(task, "spearman", pairs) for task in pairs]
    names += [_named(task, "accuracy", labelled) for task in labelled]
    return names + [_named(task, metric, retrieval) for task in retrieval for metric in ("ndcg@10", "recall@10")]


def encode_everywhere(
    encoder: Encoder, texts: Sequence[str], *, role: str | None = None, progress: str | None = None
) -> Float[Tensor, "n d"]:
    """The vectors of `texts` on every process, each of which computes its share."""
    share = distributed.share(len(texts))
    bar = progress if distributed.is_main() else None
    mine = encoder.encode(texts[share.start : share.stop], role=role, progress=bar)
    return distributed.gather_rows(mine.to(encoder.device)).cpu()


def _reference(texts: Sequence[str], encode: Encode, teacher: Encoder, role: str | None) -> Reference:
    lengths = teacher.tokenize(texts, prompt=teacher.prompt(role)).tokens.lengths
    return Reference(encode(texts, role=role), lengths)


def _headlines(slices: Sequence[Slice]) -> dict[str, Score]:
    """The numbers of `fidelity`: what of the whole stands in the table."""
    return {name: score for part in slices[:1] for name, score in part.scores.items() if is_headline(name)}


def _retrieval_scores(queries: Encode, documents: Sequence[Encode], data: EvaluationData) -> dict[str, Score]:
    """Of an index by one encoder, or by an old one and a new one that share it."""
    scores: dict[str, Score] = {}
    for name, task in data.retrieval.items():
        index = [encode(task.corpus, role="document") for encode in documents]
        vectors = index[0] if len(index) == 1 else mixed_index(task.corpus_ids, index[0], index[1])
        found = retrieval(queries(task.queries, role="query"), vectors, task)
        scores |= {_named(name, metric, data.retrieval): score for metric, score in found.items()}
    return scores


def _stored_scores(system: str, encode: Encode, data: EvaluationData) -> list[Stored]:
    """A system's own queries and documents, in fewer bytes."""
    texts = data.texts if data.texts or data.retrieval else data.any_texts()[:1]  # one for a vector's bytes alone
    if not data.precisions or not (texts or data.retrieval):
        return []
    return stored_scores(system, encode, data.precisions, texts, data.role, data.retrieval)


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


def _named(task: str, metric: str, tasks: Collection[str]) -> str:
    return metric if len(tasks) == 1 and not task else f"{task} {metric}"


def _once(encode: Encode) -> Encode:
    """The same texts are encoded once: an index of the student's serves several systems."""
    known: dict[tuple[str | None, tuple[str, ...]], Float[Tensor, "n d"]] = {}

    def remembered(texts: Sequence[str], *, role: str | None = None) -> Float[Tensor, "n d"]:
        key = role, tuple(texts)
        if key not in known:
            known[key] = encode(texts, role=role)
        return known[key]

    return remembered


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
