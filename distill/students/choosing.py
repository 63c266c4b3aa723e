"""Which of the teacher's layers to keep: those that, untrained, come nearest to the teacher's own vectors."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from distill import distributed
from distill.encoder import Encoder
from distill.errors import RecipeError
from distill.heads import RIDGES
from distill.modules import Tokens, eval_mode
from distill.similarity import normalize, pairwise_cosine, usable_rows
from distill.students.blocks import layer_list, only_layers, transformer_of
from distill.texts import Texts, texts_by_role

REMEMBERED_BYTES = 2**30  # of hidden states; what does not fit is computed again

Layers = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The layers to keep, with the mean cosine of every set that was tried."""

    layers: Layers
    total: int
    """Layers of the teacher."""
    tried: dict[Layers, float]
    """Mean cosine to the teacher, in the order of the trials; after a ridge projection if `projection`."""
    texts: int
    projection: bool
    passes: float
    """Cost, in passes of the whole teacher over the texts."""
    seconds: float

    @property
    def cosine(self) -> float:
        return self.tried[self.layers]

    def __str__(self) -> str:
        best = sorted(self.tried.items(), key=lambda item: -item[1])[:4]
        others = ", ".join(f"{' '.join(map(str, kept))}: {cosine:.3f}" for kept, cosine in best if kept != self.layers)
        return (
            f"layers {' '.join(map(str, self.layers))} of {self.total}: cosine {self.cosine:.3f} to the teacher on {self.texts} texts"
            f"{' after a ridge projection' if self.projection else ''}, before training; {len(self.tried)} sets tried in "
            f"{self.passes:.1f} passes of the teacher, {self.seconds:.0f} s" + (f" (then {others})" if others else "")
        )


def choose_layers(
    teacher: Encoder,
    count: int = 3,
    *,
    texts: Texts,
    vectors: Float[Tensor, "n e"] | None = None,
    projection: bool = False,
    passes: float = 8.0,
) -> Choice:
    """The `count` layers whose student has the highest mean cosine to the teacher on `texts`, before any training.

    Tries the usual sets (lowest and last, evenly spread, lowest, ...), then exchanges one layer at a time for a better one
    until none is better or the budget is spent. `projection` compares after a ridge regression to the teacher's vectors,
    each text predicted from all the others: the start that `fit_projection` gives. `vectors` are the teacher's own, in
    the order of `texts` (by role, if so given); without them the teacher runs over the texts here.
    Cost: at most `passes` passes of the whole teacher over the texts, since what a layer gave after the same layers is
    remembered (1 GiB); the regression adds O(n^2 (n + e)) a set. Always the same for the same texts.
    """
    model = transformer_of(teacher).model
    total = len(layer_list(model, teacher.name)[1])
    if not 1 <= count <= total or not passes > 0:
        raise RecipeError(
            f"{teacher.name} has {total} layers; asked to choose {count} of them in {passes} passes of the teacher."
        )
    tokens, targets = _usable(teacher, texts, vectors)
    began = time.monotonic()
    bar = tqdm(desc="sets of layers", unit="set", delay=2, disable=distributed.hides_bars())
    with torch.no_grad(), eval_mode(teacher), bar:
        search = _Search(_Partial(teacher, tokens), targets, projection, budget=int(passes * total), bar=bar)
        best = search.best(count)
    return Choice(
        layers=best,
        total=total,
        tried=search.tried,
        texts=len(targets),
        projection=projection,
        passes=search.spent / total,
        seconds=time.monotonic() - began,
    )


def usual_sets(count: int, total: int) -> list[Layers]:
    """Sets of `count` of `total` layers that have worked: the ends, spread evenly, the lowest, halves from both ends."""
    last = total - 1
    if count == 1:
        return list(dict.fromkeys([(last,), (0,)]))
    sets = [
        (*range(count - 1), last),
        tuple((2 * number * last + count - 1) // (2 * (count - 1)) for number in range(count)),
        tuple(range(count)),
        tuple((number + 1) * total // count - 1 for number in range(count)),
        (*range((count + 1) // 2), *range(total - count // 2, total)),
        (0, *range(total - count + 1, total)),
    ]
    return list(dict.fromkeys(sets))


@dataclass
class _Search:
    """Sets of layers tried so far, and what that has cost, in passes of one layer."""

    partial: "_Partial"
    targets: Float[Tensor, "n e"]
    projection: bool
    budget: int
    bar: Any
    tried: dict[Layers, float] = field(default_factory=dict)
    spent: int = 0

    def best(self, count: int) -> Layers:
        for kept in usual_sets(count, self.partial.total):
            if kept[0] == 0 or not self.partial.first_is_special:
                self._try(kept)
        best = self._leader()
        while (better := self._exchanged(best)) != best:
            best = better
        return best

    def _exchanged(self, best: Layers) -> Layers:
        """The best set that differs in one layer. The last place comes first: all that is before it is remembered."""
        for place in reversed(range(int(self.partial.first_is_special), len(best))):
            rest = best[:place] + best[place + 1 :]
            for new in sorted(set(range(self.partial.total)) - set(best)):
                self._try(tuple(sorted((*rest, new))))
            if self.tried[self._leader()] > self.tried[best]:
                break
        return self._leader()

    def _leader(self) -> Layers:
        return max(self.tried, key=lambda kept: self.tried[kept])

    def _try(self, kept: Layers) -> None:
        cost = self.partial.cost(kept)
        if kept in self.tried or (self.tried and self.spent + cost > self.budget):
            return
        vectors = self.partial.vectors(kept)
        score = after_ridge(vectors, self.targets) if self.projection else pairwise_cosine(vectors, self.targets).mean()
        self.tried[kept] = float(score)
        self.spent += cost
        self.bar.update()


class _Partial:
    """A teacher that runs over the same texts with some of its layers. Outputs of a layer after the same layers are remembered."""

    def __init__(self, teacher: Encoder, tokens: Tokens):
        self.teacher, self.tokens, self.model = teacher, tokens, transformer_of(teacher).model
        self.path, layers = layer_list(self.model, teacher.name)
        self.total = len(layers)
        first, second = (set(layer.state_dict()) for layer in (layers[0], layers[-1]))
        self.first_is_special = first != second  # ModernBERT: without a norm; T5: with the bias that all layers use
        self.outputs: dict[Layers, list[Any]] = {}
        teacher.compute(tokens.rows(torch.tensor([0])))  # `unpadded.trial` runs a model: before its layers are watched

    def cost(self, kept: Layers) -> int:
        """Layers that have to run."""
        return len(kept) - self._known(kept)

    def vectors(self, kept: Layers) -> Float[Tensor, "n e"]:
        known = self._known(kept)
        with ExitStack() as stack:
            layers = stack.enter_context(only_layers(self.model, self.path, kept))
            for place, layer in enumerate(layers[:-1]):
                if place < known:
                    stack.enter_context(_replayed(layer, self.outputs[kept[: place + 1]]))
                else:
                    calls: list[Any] = []
                    self.outputs[kept[: place + 1]] = calls
                    hook = layer.register_forward_hook(lambda _, __, output, calls=calls: calls.append(output))
                    stack.callback(hook.remove)
            vectors = self.teacher.compute(self.tokens).cpu()
        self._forget(kept)
        return vectors

    def _known(self, kept: Layers) -> int:
        places = range(1, len(kept))
        return next((place - 1 for place in places if kept[:place] not in self.outputs), len(kept) - 1)

    def _forget(self, kept: Layers) -> None:
        """Drop the oldest of what is remembered until the rest fits; what was used now is the newest."""
        for place in range(1, len(kept)):
            self.outputs[kept[:place]] = self.outputs.pop(kept[:place])
        while sum(map(_size, self.outputs.values())) > REMEMBERED_BYTES:
            del self.outputs[next(iter(self.outputs))]


@contextmanager
def _replayed(layer: Any, calls: list[Any]) -> Iterator[None]:
    """A layer that gives what it gave before, call by call."""
    given = iter(calls)
    layer.forward = lambda *_, **__: next(given)
    try:
        yield
    finally:
        del layer.forward


@torch.no_grad()
def after_ridge(student: Float[Tensor, "n d"], teacher: Float[Tensor, "n e"]) -> float:
    """Mean cosine to the teacher of each row as a ridge regression on all the other rows predicts it.

    Equals fitting n regressions from unit student rows, each without one row, for the best of RIDGES. Closed form: the
    prediction without row i is t_i - a_i / q_ii, where a = Q t and Q = (S S' + ridge * mean eigenvalue * I)^-1.
    O(n^2 (n + e)) FLOP in float64.
    """
    rows, targets = normalize(student.double()), teacher.double()
    values, directions = torch.linalg.eigh(rows @ rows.T)
    rotated = directions.T @ targets
    cosines = []
    for ridge in RIDGES:
        inverse = 1 / (values.clamp(min=0) + ridge * values.mean())
        dual = directions @ (rearrange(inverse, "n -> n 1") * rotated)
        own = directions.square() @ inverse
        cosines.append(float(pairwise_cosine(targets - dual / rearrange(own, "n -> n 1"), targets).mean()))
    return max(cosines)


def _usable(
    teacher: Encoder, texts: Texts, vectors: Float[Tensor, "n e"] | None
) -> tuple[Tokens, Float[Tensor, "usable e"]]:
    """Tokens of the texts in their roles, and the teacher's vectors, where these are finite and not zero."""
    roles = texts_by_role(texts)
    if vectors is None:
        vectors = torch.cat([teacher.encode(some, role=role, progress="teacher") for role, some in roles])
    parts = [teacher.tokenize(some, prompt=teacher.prompt(role)).tokens for role, some in roles]
    tokens = Tokens(torch.cat([part.ids for part in parts]), torch.cat([part.lengths for part in parts]))
    if vectors.shape != (len(tokens), teacher.width):
        raise RecipeError(
            f"{len(tokens)} texts and teacher vectors {tuple(vectors.shape)}; expected ({len(tokens)}, {teacher.width}), in the same order."
        )
    good = usable_rows(vectors)
    if good.sum() < 8:
        raise RecipeError(
            f"layers are chosen by 8 texts at least, better some hundred; got {int(good.sum())} usable ones."
        )
    return tokens.rows(good.nonzero().flatten()), vectors[good].float()


def _size(calls: list[Any]) -> int:
    tensors = [tensor for call in calls for tensor in (call if isinstance(call, tuple) else (call,))]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if isinstance(tensor, Tensor))
