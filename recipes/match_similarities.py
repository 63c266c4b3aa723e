"""match_embeddings, and one idea more: similarities to a bank of stored teacher vectors are matched, too.

The bank costs no teacher pass: its rows come from the store. The relational term rises fastest early and is faded out.

    accelerate launch recipes/match_similarities.py --data texts.jsonl --train.bank-size 16384
"""

import copy
from dataclasses import dataclass, field
from pathlib import Path

from distill import cli
from distill.config import EvaluationConfig, StudentConfig, TeacherConfig, hold_out
from distill.data import load_texts
from distill.embed import embed
from distill.evaluation import evaluate
from distill.examples import match
from distill.export import Provenance
from distill.losses import CosineDistance, CrossContrastive, CrossKL, WeightedSum, linear_decay
from distill.report import finish
from distill.training import TrainConfig, train


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the three terms; 0 leaves a term out."""

    cosine: float = 1.0
    """Each text to its twin."""
    contrastive: float = 0.1
    """Each text's twin found among the bank."""
    kl: float = 0.1
    """The teacher's distribution over the bank, faded out by `kl_until`."""
    kl_until: float = 0.5
    """Share of the run after which the KL term is gone."""
    temperature: float = 0.05
    """Of contrastive and KL, student and teacher."""

    def build(self) -> WeightedSum:
        terms = {
            "cosine": CosineDistance(),
            "contrastive": CrossContrastive(temperature=self.temperature),
            "kl": CrossKL(temperature=self.temperature),
        }
        weights = {
            "cosine": self.cosine,
            "contrastive": self.contrastive,
            "kl": linear_decay(self.kl, self.kl_until) if self.kl else 0.0,
        }
        chosen = [name for name in terms if getattr(self, name)]
        return WeightedSum({name: terms[name] for name in chosen}, {name: weights[name] for name in chosen})


@dataclass(frozen=True, kw_only=True)
class Recipe:
    data: tuple[str, ...]
    """Texts to train on: files (JSONL, CSV, TXT, Parquet, .gz), globs, or Hub data sets as org/name:config:split."""
    column: str | None = None
    """Column of the texts, or several: "sentence1,sentence2"; by position in a CSV without header: "0,1"."""
    limit: int | None = None
    """Train on this many texts at most."""
    held_out: int = 500
    """Of these texts, kept for the fidelity report."""
    store: Path | None = None
    """Folder of the teacher's vectors; None: in the cache, by teacher."""
    output: Path = Path("runs/match_similarities")
    """Folder of the run."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=lambda: TrainConfig(epochs=10, bank_size=4096))
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


def main(recipe: Recipe) -> None:
    cli.record(recipe, recipe.output)
    loss = recipe.loss.build()
    read = load_texts(recipe.data, column=recipe.column, limit=recipe.limit)
    texts, held_out = hold_out(read.texts, recipe.held_out)
    cli.say(read.report)

    teacher = recipe.teacher.load()
    store = embed(texts, teacher, recipe.store)
    student = recipe.student.build(teacher, store, texts)
    start = copy.deepcopy(student)
    run = train(student, match(texts, student, teacher, store), store, loss, recipe.train, output=recipe.output)

    data = recipe.evaluation.load(held_out)
    scores = evaluate({"untrained start": start, "student": run.student}, teacher, data, store=store.path)
    finish(run, scores, Provenance(teacher=teacher, data=str(read.report), loss=repr(recipe.loss)))


if __name__ == "__main__":
    cli.run(main, Recipe)
