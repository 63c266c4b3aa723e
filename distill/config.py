"""Groups of flags that recipes share, and what they build."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from distill import distributed, students
from distill.data import load_labelled, load_pairs, load_retrieval
from distill.embed import embed_vocabulary
from distill.encoder import Encoder
from distill.errors import RecipeError
from distill.evaluation import EvaluationData
from distill.store import Store, text_keys


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """The model whose vector space the student is to live in."""

    name: str = "sentence-transformers/all-mpnet-base-v2"
    """A local folder, a name on the Hub, or an installed weight package."""
    revision: str | None = None
    """Branch, tag or commit on the Hub; None: the one pinned on first use."""
    max_length: int | None = 128
    """Tokens a text is cut at; None: the model's own limit. It is part of the store's fingerprint."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the teacher's forward pass."""

    def load(self) -> Encoder:
        teacher = Encoder.from_pretrained(
            self.name, revision=self.revision, max_length=self.max_length, compute_dtype=self.compute_dtype
        )
        return teacher.to(distributed.device())


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """How the student starts."""

    kind: Literal["static", "layers", "pretrained"] = "static"
    """static: a table of token vectors; layers: some of the teacher's; pretrained: another model."""
    width: int = 256
    """Of a static table."""
    layers: tuple[int, ...] = (0, 1, 11)
    """Numbers of the teacher's layers to keep, from 0."""
    name: str | None = None
    """Of the pretrained model: folder or Hub name."""
    projection: Literal["ridge", "none"] = "none"
    """ridge: start the Dense layer to the teacher's width at the closed-form solution on the training texts."""
    freeze_token_table: bool = True
    """Leave a transformer's input embeddings as they are."""

    def __post_init__(self) -> None:
        if (self.kind == "pretrained") != (self.name is not None):
            raise RecipeError("--student.name names the model of --student.kind pretrained; give both or neither.")

    def build(self, teacher: Encoder, store: Store, texts: list[str]) -> Encoder:
        """The student, untrained, on the teacher's device. The token vectors of a static one are kept in the store."""
        if self.kind == "static":
            vectors = embed_vocabulary(teacher, store.path)
            student = students.static(teacher, width=self.width, token_vectors=vectors, texts=texts)
        elif self.kind == "layers":
            student = students.keep_layers(teacher, self.layers, projection=self.projection == "ridge")
        else:
            student = students.pretrained(str(self.name), teacher)
        student.to(teacher.device)
        if self.projection == "ridge" or (self.kind == "pretrained" and student.width != student.backbone.width):
            students.fit_projection(student, texts, store.vectors(texts, prompt=teacher.prompt(None)))
        if self.kind != "static" and self.freeze_token_table:
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

    def load(self, texts: list[str]) -> EvaluationData:
        """The data, with `texts` for fidelity."""
        pairs = {Path(name).name.split(".")[0]: load_pairs(name) for name in self.sts}
        retrieval = {}
        if self.corpus and self.queries and self.qrels:
            retrieval[Path(self.corpus).name.split(".")[0]] = load_retrieval(self.corpus, self.queries, self.qrels)
        labelled = {}
        if self.classify_train and self.classify_test:
            labelled[Path(self.classify_test).name.split(".")[0]] = load_labelled(
                self.classify_train, self.classify_test
            )
        return EvaluationData(texts=texts, pairs=pairs, retrieval=retrieval, labelled=labelled)


def hold_out(texts: list[str], count: int) -> tuple[list[str], list[str]]:
    """Training texts and `count` held-out ones, chosen by the texts themselves: the order of files does not matter."""
    if count < 0 or len(texts) - count < 2:
        raise RecipeError(
            f"--held-out {count} leaves {len(texts) - count} of {len(texts)} texts to train on; at least 2 are needed."
        )
    order = sorted(range(len(texts)), key=lambda number: bytes(text_keys([texts[number]])))
    held = set(order[:count])
    return [text for number, text in enumerate(texts) if number not in held], [texts[number] for number in sorted(held)]
