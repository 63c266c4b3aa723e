"""Training on labels: an encoder and a CosineLinear together, the encoder held by the vectors of a teacher or of its own past.

loss = cross-entropy of the head's logits + distillation * (1 - cosine of each vector to its target). A target is a stored
vector: of the teacher, or what the encoder itself gave before it saw new classes ("less-forget", Hou et al. 2019).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from distill import distributed
from distill.ahead import sent
from distill.encoder import Encoder
from distill.errors import DataError, NumericsError, RecipeError
from distill.heads import CosineLinear, class_logits, classification_loss, parameter_groups
from distill.losses import cosine_distance
from distill.modules import Tokens
from distill.similarity import normalize
from distill.training import finite, sampling
from distill.training.optimizer import set_rate
from distill.training.settings import out_of_range

NO_LABEL = -1
MOST_NAMED = 5  # rows in a message


@dataclass(frozen=True, kw_only=True)
class LabelConfig:
    """How an encoder and its head are trained on labels."""

    epochs: float = 10.0
    """Passes over the texts."""
    batch_size: int = 256
    """Texts a step over all processes."""
    learning_rate: float = 1e-3
    """Peak of the encoder's rate."""
    proxy_learning_rate: float = 1e-2
    """Peak of the proxies' rate."""
    sigma_learning_rate: float = 1e-1
    """Peak of the rate of sigma, the learned scale of the cosines."""
    weight_decay: float = 0.01
    """On the encoder's matrices and the proxies; vectors and sigma have none."""
    distillation: float = 10.0
    """Weight of the cosine distance to the targets; 0: labels alone."""
    warmup_fraction: float = 0.1
    """Share of the steps in which the rates rise from 0; a cosine brings them down again."""
    clip_norm: float | None = 1.0
    """Clip the encoder's gradient to this norm. 0: do not clip."""
    seed: int | None = None
    """Of the order of texts; None: the recipe's."""

    def __post_init__(self) -> None:
        positive = ("epochs", "batch_size", "learning_rate", "proxy_learning_rate", "sigma_learning_rate")
        wrong = out_of_range(self, positive, ("weight_decay", "distillation", "clip_norm", "seed"))
        if not 0 <= self.warmup_fraction <= 1:
            wrong.append(f"warmup_fraction is 0..1, got {self.warmup_fraction}")
        if wrong:
            raise RecipeError("; ".join(wrong) + ".")

    def with_seed(self, seed: int) -> "LabelConfig":
        """The same with this seed, if it has none of its own."""
        return replace(self, seed=seed) if self.seed is None else self


@dataclass(frozen=True, eq=False)
class LabelledTexts:
    """Texts as the encoder reads them, their classes, and the vectors that are to hold it. NO_LABEL: a text without a class."""

    tokens: Tokens
    labels: Int[Tensor, " n"]
    targets: Float[Tensor, "n d"] | None = None
    texts: Sequence[str] | None = None
    """To be quoted where training stops at one of them."""

    @classmethod
    def read(
        cls,
        encoder: Encoder,
        texts: Sequence[str],
        labels: Int[Tensor, " n"],
        targets: Float[Tensor, "n d"] | None = None,
    ) -> "LabelledTexts":
        """Texts as `encoder.encode(texts)` reads them: with its default prompt."""
        return cls(encoder.tokenize(texts, prompt=encoder.prompt(None)).tokens, labels, targets, texts)

    def __post_init__(self) -> None:
        sizes = [len(self.tokens), len(self.labels)] + ([] if self.targets is None else [len(self.targets)])
        if len(set(sizes)) > 1 or not len(self.labels):
            raise DataError(f"labelled texts need a label and a target each, got {sizes} texts, labels and targets.")
        if self.targets is not None and not (finite := self.targets.isfinite().all(dim=1)).all():
            raise DataError(f"the target of text {int((~finite).nonzero()[0])} is not finite: leave the text out.")

    def __len__(self) -> int:
        return len(self.labels)


Log = Callable[[dict[str, Any]], object]


class LabelTraining:
    """An encoder, its head, and the AdamW of both, which outlives a task: `add_classes` keeps what it knows.

    `fit` may be called again with other texts; every call is a schedule of its own. N processes give the gradient of one.
    """

    def __init__(self, encoder: Encoder, head: CosineLinear, config: LabelConfig):
        if head.in_features != encoder.width:
            raise RecipeError(
                f"the head reads vectors of width {head.in_features}, {encoder.name} gives {encoder.width}."
            )
        self.encoder, self.head, self.config, self.steps = encoder, head.to(encoder.device), config, 0
        distributed.give_to_all([*encoder.parameters(), *head.parameters()])
        groups = parameter_groups(
            nn.ModuleList([encoder, head]),
            lr=config.learning_rate,
            sigma_lr=config.sigma_learning_rate,
            weight_decay=config.weight_decay,
            rates={head.weight: config.proxy_learning_rate / config.learning_rate},
        )
        self.optimizer = torch.optim.AdamW([{**group, "peak": group["lr"]} for group in groups], fused=True)

    def add_classes(self, n: int) -> None:
        """Give the head n classes more; proxies, optimizer state and steps of the others stay."""
        self.head.add_classes(n, self.optimizer)
        distributed.give_to_all([self.head.weight])

    def fit(
        self, texts: LabelledTexts, *, fixed_classes: int = 0, log: Log | None = None, progress: str = "labels"
    ) -> None:
        """Train on the texts for config.epochs; the proxies of the first `fixed_classes` classes stay where they are.

        `log` gets an entry a step: loss, loss/labels, loss/teacher, sigma. A loss or gradient that is not finite stops all
        processes before the update: NumericsError.
        """
        if self.config.distillation and texts.targets is None:
            raise RecipeError("distillation above 0 pulls vectors to targets, and none were given: give some, or 0.")
        size, seed = self.config.batch_size, self.config.seed or 0
        steps = max(1, round(self.config.epochs * sampling.steps_per_epoch(len(texts), size, 1)))
        fixed = self.head.weight.detach()[: fixed_classes * self.head.nb_proxy].clone()
        bar = tqdm(range(steps), desc=progress, unit="step", delay=2, disable=distributed.hides_bars())
        for step in bar:
            [rows] = sampling.batches(step, len(texts), batch_size=size, accumulation=1, seed=seed)
            entry = self._step(texts, torch.from_numpy(rows), self._rate((step + 0.5) / steps))
            self.head.weight.data[: len(fixed)] = fixed  # AdamW moves a row without a gradient, too
            if log:
                log(entry)
        self.encoder.eval()

    def predict(self, vectors: Float[Tensor, "n d"]) -> Int[Tensor, "n"]:
        """The class of each vector, on the CPU."""
        with torch.no_grad():
            output = self.head(vectors.to(self.encoder.device))
        return class_logits("predict", output).argmax(dim=1).cpu()

    def _step(self, texts: LabelledTexts, rows: Int[Tensor, " b"], rate: float) -> dict[str, Any]:
        set_rate(self.optimizer, rate)
        self.optimizer.zero_grad()
        parts = self._parts(texts, rows)
        value = parts["labels"] + self.config.distillation * parts["teacher"]
        if value.requires_grad:  # not on a process without a row of the batch
            value.backward()
        logged = {"loss": value, "loss/labels": parts["labels"], "loss/teacher": parts["teacher"]}
        sums = _sum_over_processes(torch.stack([part.detach().float() for part in logged.values()]))
        self._exchange()
        sigma = {} if self.head.sigma is None else {"sigma": self.head.sigma}
        values = finite.numbers({**dict(zip(logged, sums, strict=True)), **sigma, "grad_norm": self._clip()})
        norm = values.pop("grad_norm")
        if distributed.any_process(not finite.are_finite(values["loss"], norm), self.encoder.device):
            self._refuse(texts, rows, values["loss"], norm)
        self.optimizer.step()
        self.steps += 1
        return {"step": self.steps, **values, "lr": self.config.learning_rate * rate, "texts": len(rows)}

    def _parts(self, texts: LabelledTexts, rows: Int[Tensor, " b"]) -> dict[str, Float[Tensor, ""]]:
        """This process's part of the batch's mean cross-entropy, over texts with a label, and of its mean cosine distance."""
        device, share = self.encoder.device, distributed.share(len(rows))
        mine = rows[share.start : share.stop]
        parts = dict.fromkeys(("labels", "teacher"), torch.zeros((), device=device))
        if not len(mine):
            return parts
        vectors, labels = self.encoder(texts.tokens.rows(mine)), texts.labels[mine]
        known = (labels != NO_LABEL).nonzero().squeeze(1)
        if len(known):
            share_of_labels = len(known) / int((texts.labels[rows] != NO_LABEL).sum())
            output = self.head(vectors.index_select(0, sent(known, device)))
            parts["labels"] = share_of_labels * classification_loss(output, sent(labels[known], device))
        if texts.targets is not None and self.config.distillation:
            targets = sent(texts.targets[mine], device)
            parts["teacher"] = len(mine) / len(rows) * cosine_distance(vectors, targets)
        return parts

    def _exchange(self) -> None:
        """Sum gradients over processes. One that no process has stays None, as without others: AdamW leaves its parameter alone."""
        if distributed.world_size() == 1:
            return
        trained = [p for p in (*self.encoder.parameters(), *self.head.parameters()) if p.requires_grad]
        learned = distributed.any_process_each([p.grad is not None for p in trained], self.encoder.device)
        for parameter, any_has in zip(trained, learned, strict=True):
            if any_has:
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                dist.all_reduce(parameter.grad)

    def _clip(self) -> Float[Tensor, ""]:
        """Clip the encoder's gradient; the norm of the whole one as it was."""
        encoder = nn.utils.clip_grad_norm_(self.encoder.parameters(), self.config.clip_norm or math.inf)
        head = nn.utils.get_total_norm([p.grad for p in self.head.parameters() if p.grad is not None])
        return torch.hypot(encoder, head)

    def _rate(self, progress: float) -> float:
        warmup = self.config.warmup_fraction
        return (
            progress / warmup if progress < warmup else (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup))) / 2
        )

    def _refuse(self, texts: LabelledTexts, rows: Int[Tensor, " b"], loss: float, norm: float) -> NoReturn:
        """Name the first rows of the step whose vector is not finite, and stop."""
        targets = None if texts.targets is None else texts.targets[rows]
        bad = rows[finite.bad_rows(self.encoder, texts.tokens.rows(rows), targets)].tolist()
        named = [f"{row} ({texts.texts[row][:60]!r})" if texts.texts else str(row) for row in bad[:MOST_NAMED]]
        raise NumericsError(
            f"{finite.stopped(self.steps + 1, loss, norm, len(bad))}{': ' if named else ''}{', '.join(named)}. Lower "
            "--labels.learning-rate and the other rates, or leave the rows out."
        )


def herd(vectors: Float[Tensor, "n d"], labels: Int[Tensor, "n"], count: int) -> Int[Tensor, "k"]:
    """Numbers of `count` rows of each class whose mean direction stays nearest to the class's, chosen one by one.

    All rows of a class that has no more. Welling 2009; Rebuffi et al. 2017 (iCaRL). O(count * n * d).
    """
    chosen: list[int] = []
    for label in labels.unique().tolist():
        rows = torch.nonzero(labels == label).flatten()
        points = normalize(vectors[rows])
        mean, total, left = points.mean(0), torch.zeros_like(points[0]), list(range(len(rows)))
        for number in range(min(count, len(rows))):
            distance = (mean - (total + points[left]) / (number + 1)).norm(dim=1)
            nearest = left.pop(int(distance.argmin()))
            total = total + points[nearest]
            chosen.append(int(rows[nearest]))
    return torch.tensor(chosen, dtype=torch.long)


def _sum_over_processes(value: Tensor) -> Tensor:
    if distributed.world_size() > 1:
        dist.all_reduce(value)
    return value
