"""Groups of flags that recipes share, and what they build."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from distill import distributed, hub, students
from distill.data import load_labelled, load_pairs, load_retrieval
from distill.embed import embed_vocabulary
from distill.encoder import Encoder
from distill.errors import RecipeError
from distill.evaluation import EvaluationData
from distill.store import Store, packed, text_keys


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """The model whose vector space the student is to live in."""

    name: str = "sentence-transformers/all-mpnet-base-v2"
    """A local folder, a name on the Hub, or an installed weight package."""
    revision: str | None = None
    """Branch, tag or commit on the Hub; None: the one pinned on first use."""
    max_length: int | None = 128
    """Tokens a text is cut at; the model's own limit where that is lower."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the teacher's forward pass."""

    def __post_init__(self) -> None:
        at_least(1, "--teacher.max-length", self.max_length)

    def load(self) -> Encoder:
        """The teacher on this process's device; the main process fetches it first."""
        distributed.main_first(partial(_fetch, self.name, self.revision))
        teacher = Encoder.from_pretrained(self.name, revision=self.revision, compute_dtype=self.compute_dtype)
        teacher.max_length = min(teacher.max_length, self.max_length or teacher.max_length)
        if teacher.max_length <= teacher.special_token_count:
            least = teacher.special_token_count + 1
            raise RecipeError(f"--teacher.max-length is {least} or more for {self.name}, got {self.max_length}.")
        return teacher.to(distributed.device())


def _fetch(name: str, revision: str | None) -> None:
    hub.resolve_model(name, revision=revision)


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """How the student starts."""

    kind: Literal["static", "layers", "pretrained"] = "static"
    """A table of token vectors, some of the teacher's layers, or another model."""
    width: int | None = None
    """Of the static table; None: 256, or the teacher's width if that is smaller."""
    layers: tuple[int, ...] = ()
    """Numbers of the teacher's layers to keep, from 0; none given: 0, 1 and the last."""
    name: str | None = None
    """Of the pretrained model: folder or Hub name."""
    projection: Literal["ridge", "none"] = "none"
    """ridge: its last Dense layer starts at the closed-form solution."""
    train_token_table: bool = False
    """Train a transformer's input embeddings, too."""

    def __post_init__(self) -> None:
        if (self.kind == "pretrained") != (self.name is not None):
            raise RecipeError("--student.name names the model of --student.kind pretrained; give both or neither.")
        if self.kind != "static" and self.width is not None:
            raise RecipeError(
                f"--student.width is of --student.kind static; a student of kind {self.kind} has its own."
            )
        if self.kind != "layers" and self.layers:
            raise RecipeError(f"--student.layers is of --student.kind layers, got kind {self.kind}.")
        if list(self.layers) != sorted(set(self.layers)) or min(self.layers, default=0) < 0:
            raise RecipeError(f"--student.layers are rising numbers from 0, got {' '.join(map(str, self.layers))}.")
        at_least(1, "--student.width", self.width)

    def build(self, teacher: Encoder, store: Store, texts: list[str] | Mapping[str, list[str]]) -> Encoder:
        """The student, untrained, on the teacher's device. The token vectors of a static one are kept in the store.

        `texts` are those of the training, by role as `examples.match` takes them: {"query": [...], "document": [...]}.
        """
        by_role = list(texts.items()) if isinstance(texts, Mapping) else [(None, texts)]
        everything = [text for _, some in by_role for text in some]
        if self.kind == "static":
            vectors = embed_vocabulary(teacher, store.path)
            width = self.width or min(256, teacher.width)
            student = students.static(teacher, width=width, token_vectors=vectors, texts=everything)
        elif self.kind == "layers":
            student = students.keep_layers(teacher, self.layers or 3, projection=self.projection == "ridge")
        else:
            student = students.pretrained(str(self.name), teacher)
        student.to(teacher.device)
        if self.projection == "ridge" or (self.kind == "pretrained" and student.width != student.backbone.width):
            targets = [store.vectors(some, prompt=teacher.prompt(role)) for role, some in by_role]
            students.fit_projection(student, texts, torch.cat(targets))
        if self.kind != "static" and not self.train_token_table:
            students.freeze_token_table(student)
        return student


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Labelled data to score on; fidelity to the teacher needs none of it."""

    sts: tuple[str, ...] = ()
    """Files or Hub names of sentence pairs with scores (sentence1, sentence2, score)."""
    corpus: str | None = None
    """Documents of a retrieval task: JSONL with id and text."""
    queries: str | None = None
    """Its queries: JSONL with id and text."""
    qrels: str | None = None
    """Its judgements: TREC or BEIR qrels."""
    classify_train: str | None = None
    """Labelled texts that give each class its direction."""
    classify_test: str | None = None
    """Labelled texts to classify."""

    def __post_init__(self) -> None:
        for names in (("corpus", "queries", "qrels"), ("classify_train", "classify_test")):
            given = [getattr(self, name) is not None for name in names]
            if any(given) and not all(given):
                flags = ", ".join("--evaluation." + name.replace("_", "-") for name in names)
                raise RecipeError(f"{flags} belong together; give all or none.")
        if len({_stem(name) for name in self.sts}) < len(self.sts):
            raise RecipeError("two files of --evaluation.sts have one name before the first dot; rename one.")

    def load(self, texts: list[str], *, role: str | None = None) -> EvaluationData:
        """The data, with `texts` for fidelity. Read before the training: a mistake in a file shows at once."""
        pairs = {_stem(name): load_pairs(name) for name in self.sts}
        retrieval = {}
        if self.corpus and self.queries and self.qrels:
            retrieval[_stem(self.corpus)] = load_retrieval(self.corpus, self.queries, self.qrels)
        labelled = {}
        if self.classify_train and self.classify_test:
            labelled[_stem(self.classify_test)] = load_labelled(self.classify_train, self.classify_test)
        return EvaluationData(texts=texts, role=role, pairs=pairs, retrieval=retrieval, labelled=labelled)


def hold_out(texts: list[str], count: int | None) -> tuple[list[str], list[str]]:
    """Training texts and `count` held-out ones, chosen by the texts themselves: the order of files does not matter.

    None holds out a tenth, 500 at most.
    """
    count = min(500, len(texts) // 10) if count is None else count
    if len(texts) - count < 2:
        raise RecipeError(f"--held-out {count} of {len(texts):,} texts leaves fewer than 2 to train on.")
    order = np.argsort(packed(text_keys(texts)), kind="stable")
    held = set(order[:count].tolist())
    return [text for number, text in enumerate(texts) if number not in held], [texts[number] for number in sorted(held)]


def at_least(minimum: int, flag: str, value: int | None) -> None:
    """RecipeError if a number is given and too small."""
    if value is not None and value < minimum:
        raise RecipeError(f"{flag} is {minimum} or more, got {value}.")


def _stem(name: str) -> str:
    return Path(name).name.split(".")[0]
