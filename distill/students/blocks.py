"""The layers of a Hugging Face model: where they stand, how to run only some of them, and the same class with other weights."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from distill.encoder import Encoder
from distill.errors import RecipeError
from distill.modules import TransformerBackbone


def transformer_of(encoder: Encoder) -> TransformerBackbone:
    """The transformer in an encoder. RecipeError for a static table."""
    if not isinstance(encoder.backbone, TransformerBackbone):
        raise RecipeError(f"{encoder.name} is a static table; it has no layers to keep or to prune.")
    return encoder.backbone


def with_model(encoder: Encoder, model: nn.Module) -> Encoder:
    """The encoder's own parts around another model, in eval mode. Pooling and head are copied."""
    backbone = transformer_of(encoder)
    parts = vars(encoder.parts()) | {"head": copy.deepcopy(list(encoder.head))}
    parts["backbone"] = TransformerBackbone(model, copy.deepcopy(backbone.pooling), pad_id=backbone.pad_id)
    return Encoder(**parts).eval()


def layer_list(model: Any, name: str) -> tuple[str, nn.ModuleList]:
    """The one list of a model's layers, and its path in the model. RecipeError if there is none or several."""
    total = getattr(model.config, "num_hidden_layers", None)
    lists = [(path, m) for path, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == total]
    outer = [(path, m) for path, m in lists if not any(path.startswith(f"{other}.") for other, _ in lists)]
    shared = getattr(model.config, "num_hidden_groups", None) is not None  # ALBERT
    if shared or len(outer) != 1 or len(set(outer[0][1])) < len(outer[0][1]):
        reason = ": it runs the same weights several times" if shared else ""
        raise RecipeError(
            f"{name} ({type(model).__name__}) has {len(outer)} lists of {total} layers{reason}; keep_layers needs exactly "
            "one list, each layer with weights of its own. Start from students.pretrained, students.tiny or students.static."
        )
    return outer[0]


@contextmanager
def only_layers(model: Any, path: str, kept: Sequence[int]) -> Iterator[list[nn.Module]]:
    """The model with some of its layers alone, in place; all are back when the block ends."""
    parent, _, attribute = path.rpartition(".")
    layers, holder, config = model.get_submodule(path), model.get_submodule(parent), model.config
    before = layer_settings(config, range(len(layers)), len(layers))
    chosen = [layers[number] for number in kept]
    try:
        setattr(holder, attribute, nn.ModuleList(chosen))
        apply_settings(config, layer_settings(config, kept, len(layers)))
        yield chosen
    finally:
        setattr(holder, attribute, layers)
        apply_settings(config, before)


def layer_settings(config: Any, kept: Sequence[int], total: int) -> dict[str, Any]:
    """What a config says of its layers one by one (layer_types and the like), and their number, for the layers `kept`."""
    others = ("architectures", "pos_att_type", "eos_token_id")  # lists that may be as long by chance
    lists = {
        key: [value[number] for number in kept]
        for key, value in vars(config).items()
        if isinstance(value, list) and len(value) == total and key not in others
    }
    return lists | {"num_hidden_layers": len(kept)}


def apply_settings(config: Any, settings: Mapping[str, Any]) -> None:
    for key, value in settings.items():
        setattr(config, key, value)


def with_layers(model: Any, path: str, kept: Sequence[int], name: str) -> nn.Module:
    """A copy of the model that has the layers `kept` alone. RecipeError if its class cannot be read again like that."""
    total, place = model.config.num_hidden_layers, {number: place for place, number in enumerate(kept)}
    config, prefix = copy.deepcopy(model.config), f"{path}."
    state: dict[str, Tensor] = {}
    apply_settings(config, layer_settings(config, kept, total))
    for key, value in model.state_dict().items():
        number, _, rest = key.removeprefix(prefix).partition(".")
        if not key.startswith(prefix):
            state[key] = value
        elif int(number) in place:
            state[f"{prefix}{place[int(number)]}.{rest}"] = value
        elif number == "0" and rest.endswith("relative_attention_bias.weight"):  # T5: all layers use the first one's
            state[key] = value
    return rebuilt(model, config, state, way_out=f"Keep layer 0 of {name}, which some classes build differently.")


def rebuilt(model: Any, config: Any, state: Mapping[str, Tensor], *, way_out: str) -> nn.Module:
    """A model of the same class from `config` and `state`: what transformers makes again of its folder.

    RecipeError if the class makes of `config` other weights than those in `state`, or if transformers cannot read `config`
    back: before 5.18 it could not where all layers left of a ModernBERT are of one kind. Cost: one copy of the weights.
    """
    try:
        type(config).from_dict(config.to_dict())
    except Exception as error:  # each release of transformers checks configurations in its own way
        told = " ".join(str(error).split())
        raise RecipeError(
            f"{type(model).__name__} could not be read again from its folder: transformers {version('transformers')} does "
            f"not take the config that it writes ({type(error).__name__}: {told:.200}). Update transformers, or keep other layers."
        ) from error
    with torch.random.fork_rng(devices=[]):  # the class draws weights that are replaced at once
        fresh: Any = type(model)(config)
    expected = fresh.state_dict()
    poolers = {key: torch.zeros_like(expected[key]) for key in expected if "pooler" in key.split(".")}  # never run
    state = poolers | dict(state)
    wrong = [key for key in expected if key not in state or expected[key].shape != state[key].shape]
    wrong += [key for key in state if key not in expected]
    if wrong:
        raise RecipeError(
            f"{type(model).__name__} could not be read again from its folder: from that config the class makes another "
            f"{wrong[0]} than the student has. {way_out}"
        )
    fresh.load_state_dict(state)
    fresh.tie_weights()
    return fresh.to(model.device)
