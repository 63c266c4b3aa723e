"""What has parameters between an encoder and a loss: CosineLinear (embeddings to classes), Projection (width to width)."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import pack, rearrange, unpack
from jaxtyping import Float, Int
from torch import Tensor, nn

from distill.similarity import check_pairs, check_tensor, cosine_similarity_matrix, normalize, pairwise_cosine

HELD_OUT_ROWS = 4096
RIDGES = tuple(10.0**exponent for exponent in range(-7, 2))


class CosineLinear(nn.Module):
    """Cosines of embeddings to class proxies, times a learned scale sigma: `{"logits": ...}`.

    Equals sigma * F.linear(normalize(x), normalize(weight)), reduced to one score a class if `to_reduce`. The rows of
    `weight` are class-major: class 0's proxies, class 1's, ... Unreduced proxies add `"nb_proxy"` to the output, so that
    `classification_loss` and `metrics.accuracy` can refuse columns that are no classes.
    With sigma 1 and 100 classes the cross-entropy cannot fall below 2.667: `sigma_init=16` starts it where it can learn.
    Gidaris and Komodakis 2018; Hou et al. 2019 (LUCIR); Douillard et al. 2020 (PODNet).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        nb_proxy: int = 1,
        to_reduce: bool = False,
        sigma: bool = True,
        *,
        sigma_init: float = 1.0,
        gamma: float = 1.0,
    ) -> None:
        super().__init__()
        if min(in_features, out_features, nb_proxy) < 1:
            raise ValueError(
                f"CosineLinear needs sizes of at least 1, got {in_features=}, {out_features=}, {nb_proxy=}."
            )
        self.in_features, self.out_features, self.nb_proxy = in_features, out_features, nb_proxy
        self.to_reduce, self.gamma = to_reduce, gamma
        self.weight = nn.Parameter(_uniform_rows(out_features * nb_proxy, in_features))
        self.sigma = nn.Parameter(torch.full((1,), float(sigma_init))) if sigma else None

    def forward(self, x: Float[Tensor, "*rows d"]) -> dict[str, Any]:
        if x.shape[-1] != self.in_features:
            raise ValueError(f"CosineLinear expects rows of width {self.in_features}, got {tuple(x.shape)}.")
        rows, leading = pack([x], "* d")
        scores = cosine_similarity_matrix(rows, self.weight)
        if self.to_reduce:
            scores = reduce_proxies(scores, self.nb_proxy, gamma=self.gamma)
        [logits] = unpack(scores if self.sigma is None else self.sigma * scores, leading, "* c")
        unreduced = self.nb_proxy > 1 and not self.to_reduce
        return {"logits": logits, "nb_proxy": self.nb_proxy} if unreduced else {"logits": logits}

    @torch.no_grad()
    def imprint(self, embeddings: Float[Tensor, "n d"], labels: Int[Tensor, "n"]) -> None:
        """Set the proxies of every class in `labels` to its mean direction, or to its k-means centres if several.

        Other classes keep theirs, and so does a class whose embeddings cancel out. Qi et al. 2018.
        """
        for name, value in {"embeddings": embeddings, "labels": labels}.items():
            check_tensor("imprint", value, name)
        if embeddings.shape[1:] != (self.in_features,) or not embeddings.isfinite().all():
            raise ValueError(
                f"imprint takes finite embeddings of width {self.in_features}, got {tuple(embeddings.shape)}. Leave out "
                "those with NaN or infinite entries: they have no direction."
            )
        if labels.is_floating_point() or labels.dtype == torch.bool:
            raise TypeError(f"imprint takes labels as numbers of classes, got {labels.dtype}. Give labels.long().")
        if labels.shape != embeddings.shape[:1] or not ((labels >= 0) & (labels < self.out_features)).all():
            raise ValueError(
                f"imprint needs one label in 0..{self.out_features - 1} for each of {len(embeddings)} embeddings, got "
                f"labels {tuple(labels.shape)}. New classes come first: add_classes(n)."
            )
        self._require_own_weight("imprint")
        proxies = rearrange(self.weight.data, "(c p) d -> c p d", p=self.nb_proxy)
        for label in labels.unique().tolist():
            centres = _spherical_k_means(normalize(embeddings[labels == label]), self.nb_proxy).to(proxies)
            proxies[label] = torch.where(centres.any(-1, keepdim=True), centres, proxies[label])

    @torch.no_grad()
    def add_classes(self, n: int, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Append n classes; the weights of the others, and what `optimizer` knows about them, stay exactly as they are.

        The parameter stays the same object; its state in the optimizer is padded by zero rows. On several processes drop
        the step before, and DDP, before this, and wrap in DDP after it: ValueError else.
        """
        if n < 1:
            raise ValueError(f"add_classes needs at least one class, got {n}.")
        self._require_own_weight("add_classes")
        if optimizer is not None and not any(p is self.weight for g in optimizer.param_groups for p in g["params"]):
            raise ValueError(
                "add_classes got an optimizer that does not hold this head's weight: give it the right one."
            )
        if isinstance(optimizer, torch.optim.LBFGS) and optimizer.state:
            raise ValueError(
                "add_classes cannot add rows to what LBFGS remembers: of all parameters in one vector. Make a new one after it."
            )
        new = _uniform_rows(n * self.nb_proxy, self.in_features).to(self.weight)
        old = self.weight.shape
        _grow(self.weight, new)
        state = {} if optimizer is None else optimizer.state.get(self.weight, {})
        for name, value in state.items():
            by_row = torch.is_tensor(value) and value.shape == old and name != "col_var"  # the two of Adafactor
            if by_row or name == "row_var":
                state[name] = torch.cat([value, value.new_zeros(len(new), value.shape[1])])
        self.out_features += n

    def _require_own_weight(self, caller: str) -> None:
        """ValueError where the weight is computed, anew at each use: what is written into it would be gone."""
        if "weight" not in self._parameters:
            raise ValueError(
                f"{caller} changes the parameter weight, and this head's is computed from others (weight_norm, another "
                "parametrization). Remove that before, and register it again after."
            )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, nb_proxy={self.nb_proxy}, "
            f"to_reduce={self.to_reduce}, sigma={self.sigma is not None}, gamma={self.gamma}"
        )


def _grow(weight: nn.Parameter, new: Float[Tensor, "n d"]) -> None:
    """Append rows to the data. Whatever still holds the graph of an earlier step holds a node that expects the old shape.

    torch gives a parameter another node once its dtype changes, not its shape: so it does, and back. DDP hooks the node
    that it found, and would exchange nothing from then on: where it might, that is refused.
    """
    before = weight.data
    weight.data = torch.cat([before, new])
    if _node_has_old_shape(weight) and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        weight.data = before
        raise ValueError(
            "add_classes found the weight in the graph of an earlier step, or in DDP, which would exchange its gradients "
            "no more. Drop both before (del loss, ddp), and wrap the head in DDP after it."
        )
    after, weight.grad = weight.data, None
    weight.data = after.to(torch.float32 if after.dtype == torch.float16 else torch.float16)
    weight.data = after


def _node_has_old_shape(weight: nn.Parameter) -> bool:
    if not weight.requires_grad:
        return False
    [expected] = torch.autograd.graph.get_gradient_edge(weight).node._input_metadata
    return tuple(expected.shape) != tuple(weight.shape)


def reduce_proxies(scores: Float[Tensor, "*rows cp"], nb_proxy: int, *, gamma: float = 1.0) -> Float[Tensor, "*rows c"]:
    """One score a class: the mean of its proxies' scores, weighted by their softmax.

    Equals sum(softmax(gamma * s) * s) over the proxies of s = scores viewed as (rows, classes, proxies). At the usual
    gamma = 1 the weights are near uniform (one proxy at .9 and nine at .2 give .328); gamma = 10 gives .894.
    """
    if scores.shape[-1] % nb_proxy:
        raise ValueError(f"reduce_proxies needs {nb_proxy} columns for each class, got {tuple(scores.shape)}.")
    by_class = rearrange(scores, "... (c p) -> ... c p", p=nb_proxy)
    return ((gamma * by_class).softmax(-1) * by_class).sum(-1)


def classification_loss(output: Mapping[str, Any], targets: Int[Tensor, "b"]) -> Float[Tensor, ""]:
    """Cross-entropy in float32 of what a CosineLinear gave; refuses proxies that were not reduced to classes."""
    logits = class_logits("classification_loss", output)
    if logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"classification_loss needs one target for each row, got logits {tuple(logits.shape)} and targets "
            f"{tuple(targets.shape)}."
        )
    return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), targets)


def class_logits(caller: str, output: Mapping[str, Any]) -> Float[Tensor, "*rows c"]:
    """The logits of a head's output, if their columns are classes."""
    if not isinstance(output, Mapping):
        raise TypeError(f'{caller} takes what the head gave, {{"logits": ...}}, got {type(output).__name__}.')
    nb_proxy = output.get("nb_proxy", 1)
    if nb_proxy > 1:
        raise ValueError(
            f"{caller} takes one column for each class, got {tuple(output['logits'].shape)} with {nb_proxy} proxies a "
            f"class: a label would index the wrong column. Build CosineLinear with to_reduce=True, or call reduce_proxies."
        )
    return output["logits"]


def parameter_groups(
    module: nn.Module,
    *,
    lr: float,
    sigma_lr: float,
    weight_decay: float,
    rates: Mapping[nn.Parameter, float] | None = None,
) -> list[dict[str, Any]]:
    """Groups for an optimizer: matrices decay; biases, norms and other vectors do not; sigma has a rate of its own.

    `rates` multiplies the rates of some parameters: a table's or a projection's. Each rate is a group.
    """
    sigmas = {id(m.sigma) for m in module.modules() if isinstance(m, CosineLinear)}
    trained = [p for p in module.parameters() if p.requires_grad]
    others = [p for p in trained if id(p) not in sigmas]
    kinds = [
        ([p for p in others if p.ndim > 1], lr, weight_decay),
        ([p for p in others if p.ndim < 2], lr, 0.0),
        ([p for p in trained if id(p) in sigmas], sigma_lr, 0.0),
    ]
    groups: dict[tuple[int, float], dict[str, Any]] = {}
    for number, (parameters, rate, decay) in enumerate(kinds):
        for p in parameters:
            share = (rates or {}).get(p, 1.0)
            empty = {"params": [], "lr": rate * share, "weight_decay": decay}
            groups.setdefault((number, share), empty)["params"].append(p)
    return list(groups.values())


class Projection(nn.Linear):
    """A linear map from the student's width to the teacher's, trained with the student or solved by `ridge`."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__(in_features, out_features, bias)

    @classmethod
    def ridge(
        cls, student: Float[Tensor, "n d"], teacher: Float[Tensor, "n e"], *, ridge: float | None = None
    ) -> "Projection":
        """The map that brings student rows closest to teacher rows in the least squares, solved in float64.

        Equals W = T'S (S'S + ridge * trace(S'S) / d * I)^-1, so `ridge` has no unit. With None, the best of 1e-7 .. 10
        is chosen: every tenth row is held out (at most 4,096), its mean cosine to the teacher decides, and the map is
        then solved on all rows. O(n d (d + e) + d^3) FLOP.
        """
        check_pairs("Projection.ridge", student, teacher)
        return cls.fit_batches(zip(student.split(8192), teacher.split(8192), strict=True), ridge=ridge)

    @classmethod
    @torch.no_grad()
    def fit_batches(cls, batches: Iterable[tuple[Tensor, Tensor]], *, ridge: float | None = None) -> "Projection":
        """`ridge` from a stream of (student, teacher) rows: one pass, O(d^2 + d * e) memory."""
        if ridge is not None and not 0 <= ridge < math.inf:
            raise ValueError(f"Projection.ridge needs a ridge of at least 0, got {ridge}. None chooses one.")
        gram, cross, held = _normal_equations(batches, hold_out=ridge is None)
        if ridge is None:
            ridge = _best_ridge(gram, cross, *held)
        rest_gram, rest_cross = _products(*held)
        [weight] = _solve(gram + rest_gram, cross + rest_cross, [ridge])
        projection = cls(weight.shape[1], weight.shape[0]).to(weight.device)
        projection.weight.copy_(weight)
        return projection


def _normal_equations(batches: Iterable[tuple[Tensor, Tensor]], hold_out: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
    """S'S and S'T of the rows that are fitted, and the held-out rows themselves, in float64."""
    gram, cross, seen = torch.zeros(()), torch.zeros(()), 0
    held: list[tuple[Tensor, Tensor]] = []
    for student, teacher in batches:
        check_pairs("Projection.ridge", student, teacher)
        position = torch.arange(seen, seen + len(student), device=student.device)
        out = (position % 10 == 9) & (position < 10 * HELD_OUT_ROWS) & hold_out
        rows, targets = student.double(), teacher.double()
        more = _products(rows[~out], targets[~out])
        gram, cross, seen = gram + more[0], cross + more[1], seen + len(student)
        held.append((rows[out], targets[out]))
    if seen < 10 and hold_out:
        raise ValueError(
            f"Projection.ridge chooses ridge on every tenth row, got {seen} rows. Give more, or ridge=1e-3."
        )
    held_rows = [torch.cat(rows) for rows in zip(*held, strict=True)]
    if not seen or not all(part.isfinite().all() for part in (gram, cross, *held_rows)):
        raise ValueError(f"Projection.ridge needs rows without NaN or infinity, got {seen} rows.")
    return gram, cross, held_rows


def _products(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    return student.T @ student, student.T @ teacher


def _solve(gram: Tensor, cross: Tensor, ridges: Iterable[float]) -> list[Tensor]:
    """One eigendecomposition serves all ridges; directions that no row has stay 0, also without a ridge."""
    values, vectors = torch.linalg.eigh(gram)
    seen = values > values.max() * len(values) * torch.finfo(values.dtype).eps
    rotated = vectors.T @ cross
    shrunk = [torch.where(seen, 1 / (values + ridge * values.mean()), 0) for ridge in ridges]
    return [(vectors @ (rearrange(scale, "d -> d 1") * rotated)).T for scale in shrunk]


def _best_ridge(gram: Tensor, cross: Tensor, student: Tensor, teacher: Tensor) -> float:
    weights = _solve(gram, cross, RIDGES)
    cosines = torch.stack([pairwise_cosine(student @ weight.T, teacher).mean() for weight in weights])
    return RIDGES[int(cosines.argmax())]


def _uniform_rows(rows: int, width: int) -> Float[Tensor, "rows width"]:
    return (2 * torch.rand(rows, width) - 1) / math.sqrt(width)


def _spherical_k_means(points: Float[Tensor, "n d"], clusters: int, steps: int = 20) -> Float[Tensor, "clusters d"]:
    """Centres of unit rows by cosine; starts from the row nearest to the mean, then the farthest from those chosen."""
    centres = normalize(points.mean(0, keepdim=True))
    if clusters == 1:
        return centres
    chosen = [int((points @ centres[0]).argmax())]
    while len(chosen) < clusters:
        chosen.append(int((points @ points[chosen].T).amax(-1).argmin()))
    centres = points[chosen]
    for _ in range(steps):
        nearest = (points @ centres.T).argmax(-1)
        moved = normalize(torch.zeros_like(centres).index_add_(0, nearest, points))
        centres = torch.where(moved.any(-1, keepdim=True), moved, centres)
    return centres
