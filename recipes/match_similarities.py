"""match_embeddings, and one idea more: similarities to a bank of stored teacher vectors are matched, too.

The bank costs no teacher pass: its rows come from the store. Terms that rise fastest early are faded out.

    accelerate launch recipes/match_similarities.py --data texts.jsonl --train.bank-size 16384
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from torch import nn

from distill import cli
from distill.calibration import calibrate
from distill.compression import Format
from distill.config import EvaluationConfig, StudentConfig, TeacherConfig, at_least, describe_start, hold_out
from distill.data import load_texts
from distill.embed import embed
from distill.errors import RecipeError
from distill.evaluation import evaluate
from distill.examples import Examples, match
from distill.export import Provenance
from distill.losses import (
    CosineDistance,
    CrossContrastive,
    CrossKL,
    GramKL,
    GramMSE,
    Matryoshka,
    RKDDistance,
    WeightedSum,
    linear_decay,
)
from distill.report import finish
from distill.store import Store
from distill.training import TrainConfig, train


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the terms; 0 leaves a term out."""

    cosine: float = 1.0
    """Each text to its twin."""
    contrastive: float = 1.0
    """Each text's twin found among the bank."""
    contrastive_until: float | None = None
    """Share of the run in which the contrastive term fades out; None: it stays."""
    kl: float = 1.0
    """The teacher's distribution over the bank."""
    kl_until: float = 0.5
    """Share of the run in which the KL term fades out."""
    gram_mse: float = 0.0
    """Cosines among the batch's texts: their squared differences."""
    gram_kl: float = 0.0
    """Cosines among the batch's texts: the teacher's distribution over them."""
    rkd_distance: float = 0.0
    """Distances among the batch's texts, over their mean."""
    relational_until: float = 0.5
    """Share of the run in which the terms among the batch's texts fade out."""
    widths: tuple[int, ...] = ()
    """Narrower widths at which all terms count, too: a vector cut there is to be one."""
    temperature: float | Literal["auto"] = 0.07
    """Of contrastive and both KL; auto: by the perplexity of the teacher's rows."""
    perplexity: float = 30.0
    """Of temperature auto: the texts that a teacher's row speaks of."""

    def __post_init__(self) -> None:
        weights = {name: getattr(self, name) for name in TERMS}
        stays = self.cosine + (self.contrastive if self.contrastive_until is None else 0)
        if not min(weights.values()) >= 0 or not stays > 0:
            given = ", ".join(f"{name} {weight}" for name, weight in weights.items())
            raise RecipeError(
                f"weights are 0 or more, cosine or contrastive above 0 to the end since the others fade out; got {given}."
            )
        until = {name: getattr(self, f"{name}_until") for name in ("contrastive", "kl", "relational")}
        for name, share in until.items():
            if share is not None and not 0 < share <= 1:
                raise RecipeError(f"{name}_until is above 0, up to 1, got {share}.")
        if not (self.temperature == "auto" or self.temperature > 0) or not self.perplexity > 1:
            raise RecipeError(
                f"temperature is above 0 or auto, got {self.temperature}; perplexity above 1, got {self.perplexity}."
            )
        if list(self.widths) != sorted(set(self.widths)) or min(self.widths, default=1) < 1:
            raise RecipeError(f"widths rise from 1, each once, got {' '.join(map(str, self.widths))}.")

    def build(self, width: int) -> nn.Module:
        """The loss of vectors of the teacher's `width`, which is one of the widths in any case."""
        until = {"cosine": None, "contrastive": self.contrastive_until, "kl": self.kl_until}
        terms, weights = {}, {}
        for name, term in TERMS.items():
            if weight := getattr(self, name):
                fades = until.get(name, self.relational_until)
                terms[name] = term(self.temperature)
                weights[name] = weight if fades is None else linear_decay(weight, fades)
        total = WeightedSum(terms, weights)
        if self.widths and self.widths[-1] > width:
            raise RecipeError(f"--loss.widths go up to the teacher's {width}, got {self.widths[-1]}.")
        return Matryoshka(total, sorted({*self.widths, width})) if self.widths else total


TERMS: dict[str, Callable[[float], nn.Module]] = {
    "cosine": lambda temperature: CosineDistance(),
    "contrastive": lambda temperature: CrossContrastive(temperature=temperature),
    "kl": lambda temperature: CrossKL(temperature=temperature),
    "gram_mse": lambda temperature: GramMSE(),
    "gram_kl": lambda temperature: GramKL(temperature=temperature),
    "rkd_distance": lambda temperature: RKDDistance(),
}


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
    space = recipe.student.enter(teacher, store, texts)
    teacher, store = space.teacher, space.store
    student = recipe.student.build(teacher, store, texts)
    cli.say(describe_start(student, teacher, store, texts))
    start = copy.deepcopy(student)
    examples = match(texts, student, teacher, store)
    loss = calibrated(recipe, examples, store)
    run = train(student, examples, store, loss.build(teacher.width), recipe.train, output=recipe.output)

    scores = evaluate({"untrained start": start, "student": run.student}, teacher, data, store=store.path)
    finish(run, scores, Provenance(teacher=teacher, data=str(read.report), loss=repr(loss), space=space))


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
