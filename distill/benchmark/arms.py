"""Ways to the gradient of a loss: distill's, naive autograd's, and those of other libraries.

An arm takes a loss's name and a batch, and gives a call that returns the gradient of the student's rows.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from distill import losses
from distill.benchmark.naive import ALL, NAIVE, WITH_BANK, WITH_TEMPERATURE, Batch, twins, unit
from distill.streaming import divergence, engine, pairs

Gradient = Callable[[], Tensor]
# Rows that sentence-transformers encodes, and takes the loss of, at once. Its default of 32 is slower.
MINI_BATCH = 256


# distill

OURS: dict[str, Callable[..., Tensor]] = {
    "symmetric": partial(losses.cross_contrastive, symmetric=True),
    **{name: getattr(losses, name) for name in NAIVE if name != "symmetric"},
}


def value(loss: str, batch: Batch) -> Tensor:
    bank = (batch.bank,) if loss in WITH_BANK else ()
    options = {"temperature": batch.temperature} if loss in WITH_TEMPERATURE else {}
    return OURS[loss](batch.student, batch.teacher, *bank, **options)


def ours(loss: str, batch: Batch) -> Gradient:
    return lambda: torch.autograd.grad(value(loss, batch), batch.student)[0]


def untiled(loss: str, batch: Batch) -> Gradient:
    def gradient() -> Tensor:
        with one_tile():
            return ours(loss, batch)()

    return gradient


@contextmanager
def one_tile() -> Iterator[None]:
    """Sizes without an end, those of CUDA too."""
    names = [(engine, "TILE"), (engine, "CUDA_WIDTH"), (divergence, "CHUNK"), (divergence, "CUDA_CHUNK")]
    names += [(pairs, "SIDE"), (pairs, "CUDA_SIDE")]
    before = [getattr(module, name) for module, name in names]
    for module, name in names:
        setattr(module, name, 2**40)
    try:
        yield
    finally:
        for (module, name), value in zip(names, before, strict=True):
            setattr(module, name, value)


# torch


def naive(loss: str, batch: Batch) -> Gradient:
    return _by_autograd(lambda: NAIVE[loss](batch, ALL), batch)


def compiled(loss: str, batch: Batch) -> Gradient:
    """Naive, by torch.compile for this shape alone."""

    def value(student: Tensor, columns: Tensor) -> Tensor:
        return NAIVE[loss](Batch(student, columns, batch.temperature), ALL)

    torch.compiler.reset()  # it gives up on a function after some shapes
    fast = torch.compile(value, dynamic=False)
    return _by_autograd(lambda: fast(batch.student, batch.columns), batch)


def _by_autograd(value: Callable[[], Tensor], batch: Batch) -> Gradient:
    return lambda: torch.autograd.grad(value(), batch.student)[0]


# Other libraries, for the contrastive losses. Rows of unit length and the temperature go in with the rows.


def linear_cross_entropy(loss: str, batch: Batch) -> Gradient:
    """torch 2.13 and later, in chunks of its choice."""
    options = torch.nn.LinearCrossEntropyOptions()

    def kernel(rows: Tensor, columns: Tensor, targets: Tensor) -> Tensor:
        return F.linear_cross_entropy(rows, columns, targets, options=options)

    return _by_kernel(kernel, loss, batch)


def liger_kernel(loss: str, batch: Batch) -> Gradient:
    """One way alone: in the other the student's rows are its weight, and 0.8.5 gives a weight no gradient if its input wants none."""
    _need_cuda(batch)
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    fused = LigerFusedLinearCrossEntropyLoss()
    return _by_kernel(lambda rows, columns, targets: fused(columns, rows, targets), loss, batch)


def cut_cross_entropy(loss: str, batch: Batch) -> Gradient:
    _need_cuda(batch)
    from cut_cross_entropy import linear_cross_entropy

    return _by_kernel(linear_cross_entropy, loss, batch)


def _need_cuda(batch: Batch) -> None:
    if not batch.student.is_cuda:
        raise NotImplementedError("runs on CUDA alone")


def _by_kernel(kernel: Callable[[Tensor, Tensor, Tensor], Tensor], loss: str, batch: Batch) -> Gradient:
    """kernel(rows, columns, targets) is the mean cross-entropy of rows @ columns.T."""

    def value() -> Tensor:
        rows, targets = unit(batch.student), twins(batch)
        forward = kernel(rows / batch.temperature, unit(batch.columns), targets)
        if loss == "cross_contrastive":
            return forward
        return (forward + kernel(unit(batch.teacher) / batch.temperature, rows, targets)) / 2

    return _by_autograd(value, batch)


def sentence_transformers(loss: str, batch: Batch) -> Gradient:
    """The loss stage of its cached loss, which goes by rows in mini-batches."""
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

    encoder: Any = nn.Sequential(nn.Identity())  # this stage does not run it
    stage = CachedMultipleNegativesRankingLoss(
        encoder,
        scale=1 / batch.temperature,
        mini_batch_size=MINI_BATCH,
        directions=("query_to_doc",) if loss == "cross_contrastive" else ("query_to_doc", "doc_to_query"),
        partition_mode="per_direction",
    )
    documents = [batch.teacher] if batch.bank is None else [batch.teacher, batch.bank]

    def gradient() -> Tensor:
        batch.student.grad = None
        stage.calculate_loss([[batch.student], *([rows] for rows in documents)], with_backward=True)
        found, batch.student.grad = batch.student.grad, None
        assert found is not None
        return found

    return gradient


def attention(loss: str, batch: Batch) -> Gradient:
    """The gradient of cross_contrastive without its value: softmax attention of the student to the columns, less the twins."""

    @torch.no_grad()
    def gradient() -> Tensor:
        rows, columns = unit(batch.student), rearrange(unit(batch.columns), "n d -> 1 1 n d")
        queries = rearrange(rows, "b d -> 1 1 b d")
        seen = F.scaled_dot_product_attention(queries, columns, columns, scale=1 / batch.temperature)
        pull = (rearrange(seen, "1 1 b d -> b d") - unit(batch.teacher)) / (batch.temperature * len(rows))
        along = (pull * rows).sum(-1, keepdim=True)
        return (pull - along * rows) / batch.student.norm(dim=-1, keepdim=True)

    return gradient


# Losses that distill computes by tiles.
TILED = ("cross_contrastive", "symmetric", "cross_kl", "gram_kl", "rkd_distance")
CONTRASTIVE, EVERY = ("cross_contrastive", "symmetric"), tuple(NAIVE)
# Each with the losses that it has, in the order of the table.
ARMS: dict[str, tuple[Callable[[str, Batch], Gradient], tuple[str, ...]]] = {
    "naive": (naive, EVERY),
    "torch.compile": (compiled, EVERY),
    "linear_cross_entropy": (linear_cross_entropy, CONTRASTIVE),
    "sentence-transformers": (sentence_transformers, CONTRASTIVE),
    "attention": (attention, CONTRASTIVE[:1]),
    "liger-kernel": (liger_kernel, CONTRASTIVE[:1]),
    "cut-cross-entropy": (cut_cross_entropy, CONTRASTIVE),
    "one-tile": (untiled, TILED),
    "distill": (ours, EVERY),
}
