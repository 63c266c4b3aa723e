"""The flags --evaluation.*, the data they name, and the texts that are kept for it."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from distill.data import load_labelled, load_pairs, load_retrieval
from distill.errors import RecipeError
from distill.evaluation import EvaluationData, task_scores
from distill.store import packed, text_keys
from distill.tables.sources import without_revision


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
    precisions: tuple[Literal["int8", "uint8", "binary", "ubinary"], ...] = ()
    """Score also with vectors stored in these types: what is left of neighbours and rankings."""

    def __post_init__(self) -> None:
        for names in (("corpus", "queries", "qrels"), ("classify_train", "classify_test")):
            given = [getattr(self, name) is not None for name in names]
            if any(given) and not all(given):
                flags = ", ".join("--evaluation." + name.replace("_", "-") for name in names)
                raise RecipeError(f"{flags} belong together; give all or none.")
        if len({_stem(name) for name in self.sts}) < len(self.sts):
            raise RecipeError("two files of --evaluation.sts have one name before the first dot; rename one.")

    def tasks(self) -> list[str]:
        """The names of the scores with labels, before anything is read."""
        return task_scores(
            pairs=[_stem(name) for name in self.sts],
            retrieval=[_stem(self.corpus)] if self.corpus else [],
            labelled=[_stem(self.classify_test)] if self.classify_test else [],
        )

    def load(self, texts: list[str], *, role: str | None = None, training_texts: Iterable[str] = ()) -> EvaluationData:
        """The data, with `texts` for fidelity, and how much of it is among the `training_texts`.

        Read before the training: a mistake in a file shows at once.
        """
        pairs = {_stem(name): load_pairs(name) for name in self.sts}
        retrieval = {}
        if self.corpus and self.queries and self.qrels:
            retrieval[_stem(self.corpus)] = load_retrieval(self.corpus, self.queries, self.qrels)
        labelled = {}
        if self.classify_train and self.classify_test:
            labelled[_stem(self.classify_test)] = load_labelled(self.classify_train, self.classify_test)
        data = EvaluationData(
            texts=texts, role=role, pairs=pairs, retrieval=retrieval, labelled=labelled, precisions=self.precisions
        )
        return replace(data, seen_in_training=data.among(training_texts))


def _stem(name: str) -> str:
    return Path(without_revision(name)).name.split(".")[0]


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
