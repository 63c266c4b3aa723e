"""A copy of the teacher with some of its layers."""

import sys
from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from distill import distributed
from distill.encoder import Encoder
from distill.errors import RecipeError
from distill.modules import Dense, Normalize, TransformerBackbone, eval_mode
from distill.students.blocks import layer_list, only_layers, transformer_of, with_layers, with_model
from distill.students.choosing import choose_layers
from distill.students.projection import last_linear
from distill.students.summary import named
from distill.texts import Texts


def keep_layers(
    teacher: Encoder,
    layers: int | Sequence[int] | Literal["auto"] = 3,
    *,
    projection: bool = False,
    count: int = 3,
    texts: Texts | None = None,
    vectors: Float[Tensor, "n e"] | None = None,
) -> Encoder:
    """A copy of the teacher with some of its layers: a count (the lowest ones and the last), their numbers from 0, or "auto".

    Any Hugging Face encoder whose layers stand in one list. The embeddings, the pooling and the teacher's own Dense
    layers are kept. `projection` adds a Dense layer of the teacher's width that starts as the identity.
    "auto" is `choose_layers(teacher, count, texts=texts, vectors=vectors, projection=projection)`, which some hundred
    texts are enough for; the main process chooses for all, and prints what it tried. RecipeError if the model's class
    cannot be read again from a folder with these layers alone.
    """
    model = transformer_of(teacher).model
    if isinstance(layers, str):
        layers = _chosen(teacher, count, texts, vectors, projection)
    elif texts is not None or vectors is not None:
        raise RecipeError(f'texts and vectors choose layers for layers="auto"; got layers={layers!r} as well.')
    path, kept = layer_list(model, teacher.name)[0], layer_numbers(teacher, layers)
    student = with_model(teacher, with_layers(model, path, kept, teacher.name))
    _check_same(teacher, student, path, kept)
    if projection:
        student.head = nn.Sequential(
            *(layer for layer in student.head if isinstance(layer, Dense)),
            Dense(teacher.full_width, teacher.width).to(teacher.device),
            Normalize(),
        )
        nn.init.eye_(last_linear(student).weight)
    return named(student, f"layers-{'-'.join(map(str, kept))}", teacher)


def layer_numbers(teacher: Encoder, layers: int | Sequence[int]) -> list[int]:
    """The layers that `keep_layers` keeps, from 0. RecipeError if the teacher has none, or not these."""
    total = len(layer_list(transformer_of(teacher).model, teacher.name)[1])
    kept = [*range(layers - 1), total - 1][: max(0, layers)] if isinstance(layers, int) else list(layers)
    if not kept or kept != sorted(set(kept)) or not 0 <= kept[0] <= kept[-1] < total:
        raise RecipeError(
            f"{teacher.name} has layers 0..{total - 1}; asked to keep {layers}. Name rising numbers, or a count."
        )
    return kept


def freeze_token_table(student: Encoder) -> None:
    """Leave a transformer's input embeddings out of training: on a CPU their dense update costs more than the layers'."""
    if not isinstance(student.backbone, TransformerBackbone):
        raise RecipeError(f"{student.name} is a static table; frozen, it would have nothing left to learn.")
    student.backbone.model.get_input_embeddings().requires_grad_(False)


def _chosen(
    teacher: Encoder,
    count: int,
    texts: Texts | None,
    vectors: Float[Tensor, "n e"] | None,
    projection: bool,
) -> tuple[int, ...]:
    if texts is None:
        raise RecipeError('layers="auto" compares sets of layers on texts; give texts=[...], some hundred of them.')
    choose = partial(choose_layers, teacher, count, texts=texts, vectors=vectors, projection=projection)
    choice = distributed.main_first(choose)
    if distributed.is_main():
        print(choice, file=sys.stderr, flush=True)
    return choice.layers


def _check_same(teacher: Encoder, student: Encoder, path: str, kept: Sequence[int]) -> None:
    """Refuse a model whose layers do something else at another place, unless it is the first layer's bias that they share."""
    model = transformer_of(teacher).model
    if any("relative_attention_bias" in name for name in model.get_submodule(f"{path}.0").state_dict()) and kept[0]:
        return
    tokens = teacher.tokenize(["What a layer does, it does at every place."]).tokens
    with torch.no_grad(), eval_mode(teacher), only_layers(model, path, kept):
        expected = teacher(tokens)
    with torch.no_grad(), eval_mode(student):
        same = (student(tokens) - expected).abs().max() <= 1e-3 * expected.abs().max()
    if not same:
        raise RecipeError(
            f"{teacher.name}: a layer of {type(model).__name__} does something else when it stands at another place, so "
            f"layers {list(kept)} alone are not what they are in the teacher. Keep the lowest ones, or start from students.pretrained."
        )
