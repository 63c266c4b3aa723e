"""The flags --loss.*: weights, when each term fades out, temperature, and the widths at which all count."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import nn

from distill.errors import RecipeError
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

TERMS: dict[str, Callable[[float], nn.Module]] = {
    "cosine": lambda temperature: CosineDistance(),
    "contrastive": lambda temperature: CrossContrastive(temperature=temperature),
    "kl": lambda temperature: CrossKL(temperature=temperature),
    "gram_mse": lambda temperature: GramMSE(),
    "gram_kl": lambda temperature: GramKL(temperature=temperature),
    "rkd_distance": lambda temperature: RKDDistance(),
}


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the terms of the loss; 0 leaves a term out."""

    cosine: float = 1.0
    """Cosine distance of each text to its twin, the teacher's vector of the same text."""
    contrastive: float = 0.3
    """Contrastive loss: each text's twin is to be found among the bank."""
    contrastive_until: float | None = None
    """Share of the run in which the contrastive term fades out; None: it stays."""
    kl: float = 0.0
    """KL from the teacher's distribution over the bank to the student's."""
    kl_until: float = 0.5
    """Share of the run in which the KL term fades out."""
    gram_mse: float = 0.0
    """Squared differences of the cosines among the batch's texts."""
    gram_kl: float = 0.0
    """KL from the teacher's distribution over the batch's texts to the student's."""
    rkd_distance: float = 0.0
    """Huber loss of the distances among the batch's texts, over their mean."""
    relational_until: float = 0.5
    """Share of the run in which the terms among the batch's texts fade out."""
    widths: tuple[int, ...] = ()
    """Matryoshka: all terms also on vectors cut to each of these widths, so that cut vectors can be used."""
    temperature: float | Literal["auto"] = 0.07
    """Of contrastive and both KL. auto: the one at which the teacher's rows have --loss.perplexity."""
    perplexity: float = 30.0
    """With temperature auto: over how many texts, in effect, a row of the teacher spreads."""

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

    @property
    def uses_bank(self) -> bool:
        """Whether a term takes further teacher vectors as columns."""
        return bool(self.contrastive or self.kl)

    def check(self, width: int) -> None:
        """RecipeError for widths that vectors of the teacher's `width` cannot be cut to: before they are computed."""
        if self.widths and self.widths[-1] > width:
            raise RecipeError(f"--loss.widths go up to the teacher's {width}, got {self.widths[-1]}.")

    def build(self, width: int) -> nn.Module:
        """The loss of vectors of the teacher's `width`, which is one of the widths in any case."""
        if self.temperature == "auto":
            raise RecipeError(
                "temperature auto is replaced by the number that calibration.calibrate finds, then built."
            )
        until = {"cosine": None, "contrastive": self.contrastive_until, "kl": self.kl_until}
        terms, weights = {}, {}
        for name, term in TERMS.items():
            if weight := getattr(self, name):
                fades = until.get(name, self.relational_until)
                terms[name] = term(self.temperature)
                weights[name] = weight if fades is None else linear_decay(weight, fades)
        total = WeightedSum(terms, weights)
        self.check(width)
        return Matryoshka(total, sorted({*self.widths, width})) if self.widths else total
