"""match_embeddings, and one idea more: similarities to a bank of stored teacher vectors are matched, too.

The bank costs no teacher pass: its rows come from the store. The relational term rises fastest early and is faded out.

    accelerate launch recipes/match_similarities.py --data texts.jsonl --train.bank-size 16384
"""

import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from distill import cli
from distill.calibration import calibrate
from distill.compression import Format
from distill.config import EvaluationConfig, StudentConfig, TeacherConfig, at_least, hold_out
from distill.data import load_texts
from distill.embed import embed
from distill.errors import RecipeError
from distill.evaluation import evaluate
from distill.examples import Examples, match
from distill.export import Provenance
from distill.losses import CosineDistance, CrossContrastive, CrossKL, WeightedSum, linear_decay
from distill.report import finish
from distill.store import Store
from distill.training import TrainConfig, train


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the three terms; 0 leaves a term out."""

    cosine: float = 1.0
    """Each text to its twin."""
    contrastive: float = 1.0
    """Each text's twin found among the bank."""
    kl: float = 1.0
    """The teacher's distribution over the bank."""
    kl_until: float = 0.5
    """Share of the run in which the KL term fades out."""
    temperature: float | Literal["auto"] = 0.07
    """Of contrastive and KL; auto: by the perplexity of the teacher's rows."""
    perplexity: float = 30.0
    """Of temperature auto: the texts that a teacher's row speaks of."""

    def __post_init__(self) -> None:
        weights = (self.cosine, self.contrastive, self.kl)
        if not min(weights) >= 0 or not self.cosine + self.contrastive > 0:
            raise RecipeError(
                f"weights are 0 or more, cosine or contrastive above 0 since kl fades out; got cosine, contrastive, kl {weights}."
            )
        if not 0 < self.kl_until <= 1 or not (self.temperature == "auto" or self.temperature > 0):
            raise RecipeError(
                f"kl_until is above 0, up to 1, got {self.kl_until}; temperature above 0 or auto, got {self.temperature}."
            )
        if not self.perplexity > 1:
            raise RecipeError(f"perplexity is above 1, got {self.perplexity}.")

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
    """Files (JSONL, CSV, TXT, Parquet, .gz), globs, Hub data sets as org/name:config:split."""
    column: str | None = None
    """Column of the texts, or several: "sentence1,sentence2"; by place: "0,1"."""
    limit: int | None = None
    """Read this many texts at most."""
    held_out: int | None = None
    """Texts kept for the fidelity report; None: a tenth, 500 at most."""
    store: Path | None = None
    """Folder of the teacher's vectors; None: in the cache, by teacher."""
    store_as: str | None = None
    """How a new store keeps them: float16, int8, pca-K (K columns) or pca-K-int8; the report says what that loses. None: float16."""
    output: Path = Path("runs/match_similarities")
    """Folder of the run."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=lambda: TrainConfig(epochs=5.0, learning_rate=2e-3, bank_size=4096))
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        at_least(1, "--limit", self.limit)
        at_least(0, "--held-out", self.held_out)
        Format.parse(self.store_as or "float16")


def main(recipe: Recipe) -> None:
    cli.record(recipe, recipe.output)
    read = load_texts(recipe.data, column=recipe.column, limit=recipe.limit)
    texts, held_out = hold_out(read.texts, recipe.held_out)
    data = recipe.evaluation.load(held_out)
    cli.say(f"{read.report}; {len(held_out):,} held out")

    teacher = recipe.teacher.load()
    store = embed(texts, teacher, recipe.store, store_as=recipe.store_as)
    student = recipe.student.build(teacher, store, texts)
    start = copy.deepcopy(student)
    examples = match(texts, student, teacher, store)
    loss = calibrated(recipe, examples, store)
    run = train(student, examples, store, loss.build(), recipe.train, output=recipe.output)

    scores = evaluate({"untrained start": start, "student": run.student}, teacher, data, store=store.path)
    finish(run, scores, Provenance(teacher=teacher, data=str(read.report), loss=repr(loss)))


def calibrated(recipe: Recipe, examples: Examples, store: Store) -> LossConfig:
    """The loss with a number for its temperature."""
    if recipe.loss.temperature != "auto":
        return recipe.loss
    found = calibrate(
        examples,
        store,
        perplexity=recipe.loss.perplexity,
        columns=recipe.train.batch_size + recipe.train.bank_size,
        seed=recipe.train.seed,
        output=recipe.output,
    )
    cli.say(found)
    return replace(recipe.loss, temperature=found.temperature)


if __name__ == "__main__":
    cli.run(main, Recipe)
