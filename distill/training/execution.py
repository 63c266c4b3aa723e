"""How a transformer student is run while it is trained: compiled, or with its layers computed again in the backward pass."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from distill.encoder import Encoder
from distill.errors import RecipeError
from distill.modules import TransformerBackbone
from distill.students.blocks import layer_list, transformer_of
from distill.training.settings import TrainConfig
from distill.unpadded.context import as_here


@contextmanager
def as_asked(student: Encoder, config: TrainConfig) -> Iterator[None]:
    """The student runs as config.compile and config.gradient_checkpointing say until the block ends; names and weights stay.

    RecipeError for a static student, which has no layers to do it with.
    """
    flags = {"compile": config.compile, "gradient-checkpointing": config.gradient_checkpointing}
    asked = [f"--train.{name}" for name, on in flags.items() if on]
    backbone = student.backbone
    if asked and not isinstance(backbone, TransformerBackbone):
        raise RecipeError(
            f"{' and '.join(asked)} is for a transformer; {student.name} is a static table. Leave it out."
        )
    with ExitStack() as stack:
        if config.gradient_checkpointing:
            stack.enter_context(recomputed(student, keep_random=config.dropout))
        if config.compile and isinstance(backbone, TransformerBackbone):
            stack.enter_context(compiled(backbone.model))
        yield


@contextmanager
def compiled(model: nn.Module) -> Iterator[None]:
    """torch.compile in place, one program for all shapes: the groups of a batch differ in texts and in length."""
    model.compile(dynamic=True)
    try:
        yield
    finally:
        model._compiled_call_impl = None


@contextmanager
def recomputed(student: Encoder, *, keep_random: bool) -> Iterator[None]:
    """Each layer keeps its input alone for the backward pass, in which it is run again: the same gradient for a third more time.

    transformers' own gradient checkpointing sleeps in eval mode, in which a student without dropout is trained.
    `keep_random` gives a layer's dropout the same draws again.
    """
    some = layers(student)
    for layer in some:
        layer.forward = partial(_checkpointed, layer.forward, keep_random)
    try:
        yield
    finally:
        for layer in some:
            vars(layer).pop("forward", None)


def _checkpointed(forward: Callable[..., Any], keep_random: bool, *inputs: Any, **options: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*inputs, **options)
    return checkpoint(as_here(forward), *inputs, use_reentrant=False, preserve_rng_state=keep_random, **options)


def layers(student: Encoder) -> nn.ModuleList:
    """Those of a transformer, which are run again. RecipeError if they do not stand in one list, each with its own weights."""
    try:
        return layer_list(transformer_of(student).model, student.name)[1]
    except RecipeError as error:
        raise RecipeError(
            f"--train.gradient-checkpointing runs each layer of one list again; {student.name} has none such. Use --train.micro-batch."
        ) from error
