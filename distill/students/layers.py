"""A copy of the teacher with some of its layers."""

import copy
from collections.abc import Sequence
from typing import Any

from torch import nn

from distill.encoder import Encoder
from distill.errors import RecipeError
from distill.modules import Dense, Normalize, TransformerBackbone
from distill.students.projection import last_linear
from distill.students.summary import named


def keep_layers(teacher: Encoder, layers: int | Sequence[int] = 3, *, projection: bool = False) -> Encoder:
    """A copy of the teacher with some of its layers: a count (the lowest ones and the last) or their numbers from 0.

    Any Hugging Face encoder whose layers stand in one list. `projection` adds a Dense layer of the teacher's width that
    starts as the identity. The embeddings, the pooling and the teacher's own Dense layers are kept.
    """
    if not isinstance(teacher.backbone, TransformerBackbone):
        raise RecipeError(f"{teacher.name} is a static table; it has no layers to keep.")
    total = teacher.backbone.model.config.num_hidden_layers
    kept = [*range(layers - 1), total - 1][: max(0, layers)] if isinstance(layers, int) else list(layers)
    if not kept or kept != sorted(set(kept)) or not 0 <= kept[0] <= kept[-1] < total:
        raise RecipeError(
            f"{teacher.name} has layers 0..{total - 1}; asked to keep {layers}. Name rising numbers, or a count."
        )
    model = _with_layers(teacher.backbone.model, kept, teacher.name)
    parts = vars(copy.copy(teacher.parts())) | {"head": copy.deepcopy(list(teacher.head))}
    parts["backbone"] = TransformerBackbone(model, teacher.backbone.pooling, pad_id=teacher.backbone.pad_id)
    if projection:
        parts["head"] = [
            *(layer for layer in parts["head"] if isinstance(layer, Dense)),
            Dense(teacher.width, teacher.width),
            Normalize(),
        ]
    student = Encoder(**parts)
    if projection:
        nn.init.eye_(last_linear(student).weight)
    return named(student, f"layers-{'-'.join(map(str, kept))}", teacher)


def freeze_token_table(student: Encoder) -> None:
    """Leave a transformer's input embeddings out of training: on a CPU their dense update costs more than the layers'."""
    if not isinstance(student.backbone, TransformerBackbone):
        raise RecipeError(f"{student.name} is a static table; frozen, it would have nothing left to learn.")
    student.backbone.model.get_input_embeddings().requires_grad_(False)


def _with_layers(model: Any, kept: Sequence[int], name: str) -> nn.Module:
    total = model.config.num_hidden_layers
    lists = [(path, m) for path, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == total]
    if len(lists) != 1:
        raise RecipeError(
            f"{name} has {len(lists)} lists of {total} layers; keep_layers needs exactly one. Start from students.pretrained."
        )
    path, layers = lists[0]
    parent, _, attribute = path.rpartition(".")
    chosen = nn.ModuleList(layers[number] for number in kept)
    setattr(model.get_submodule(parent), attribute, chosen)
    try:
        copied = copy.deepcopy(model)  # copies the kept layers only
    finally:
        setattr(model.get_submodule(parent), attribute, layers)
    for key, value in vars(copied.config).items():
        if isinstance(value, list) and len(value) == total:  # layer_types and the like
            setattr(copied.config, key, [value[number] for number in kept])
    copied.config.num_hidden_layers = len(kept)
    for number, layer in enumerate(copied.get_submodule(path)):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = number
    return copied
