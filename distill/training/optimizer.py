"""AdamW over a student's parameters, the share of its learning rate at each step, and what parts multiply it by."""

from collections.abc import Callable, Iterable
from itertools import takewhile

import torch
from jaxtyping import Int
from torch import Tensor, nn

from distill.encoder import Encoder
from distill.errors import RecipeError
from distill.heads import parameter_groups
from distill.modules import Dense, StaticTable, TransformerBackbone
from distill.training.anchor import TableAnchor
from distill.training.averaging import WeightAverage
from distill.training.settings import TrainConfig
from distill.training.table_rows import TableRows


def adamw(student: Encoder, config: TrainConfig) -> torch.optim.AdamW:
    """Fused AdamW; matrices decay, vectors do not. RecipeError if a part that has a rate of its own is not trained."""
    rate, decay = config.learning_rate, config.weight_decay
    shares = _shares(student, config)
    groups = parameter_groups(student, lr=rate, sigma_lr=rate, weight_decay=decay, rates=shares)
    return torch.optim.AdamW([{**group, "peak": group["lr"]} for group in groups], lr=rate, fused=True)


def rows_of(
    student: Encoder, optimizer: torch.optim.AdamW, config: TrainConfig, average: WeightAverage | None
) -> TableRows | None:
    """What updates a static student's table by rows, in the place of `optimizer`, which no longer has it. None if it stays dense."""
    if config.table_update == "dense":
        return None
    if not isinstance(student.backbone, StaticTable) or not student.backbone.table.requires_grad:
        raise RecipeError(f"--train.table-update rows is for a static table; {student.name} trains none. Leave it out.")
    table = student.backbone.table
    own = next(group for group in optimizer.param_groups if any(value is table for value in group["params"]))
    own["params"] = [value for value in own["params"] if value is not table]
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
    return TableRows(student.backbone, own, average.hand_over(table) if average else None)


def set_rate(optimizer: torch.optim.Optimizer, share: float) -> None:
    """Give each group this share of its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * share


def anchor_of(student: Encoder, ids: Int[Tensor, " t"], config: TrainConfig) -> TableAnchor | None:
    """What pulls a static student's table to where it is now; `ids` are the tokens of the training texts. None if nothing is to."""
    if config.start_decay is None:
        return None
    if not isinstance(student.backbone, StaticTable):
        raise RecipeError(
            f"--train.start-decay pulls the rows of a static table; {student.name} has none. Leave it out."
        )
    return TableAnchor(student.backbone.table, ids, strength=config.start_decay)


def rate_of(optimizer: torch.optim.Optimizer, config: TrainConfig, steps: int) -> Callable[[float], float]:
    """The share of the learning rate at a step: a function of the step alone, so that nothing of it has to be saved."""
    from transformers import get_scheduler

    name = "constant_with_warmup" if config.schedule == "constant" else config.schedule
    warmup = round(config.warmup_fraction * steps)
    return get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=steps).lr_lambdas[0]


def _shares(student: Encoder, config: TrainConfig) -> dict[nn.Parameter, float]:
    """What multiplies the rates of the parameters that have other rates than the rest."""
    parts = {
        "projection_rate": (config.projection_rate, dict.fromkeys(_projection(student), 1)),
        "token_weight_rate": (config.token_weight_rate, dict.fromkeys(_token_weights(student), 1)),
        "table_rate": (config.table_rate, dict.fromkeys(_table(student), 1)),
        "layer_decay": (config.layer_decay, _layers_above(student)),
    }
    shares: dict[nn.Parameter, float] = {}
    for name, (share, times) in parts.items():
        if share != 1 and not any(parameter.requires_grad for parameter in times):
            flag = "--train." + name.replace("_", "-")
            raise RecipeError(
                f"{flag} is for a part that {student.name} does not have, or does not train. Leave it out."
            )
        for parameter, power in times.items() if share != 1 else ():
            shares[parameter] = shares.get(parameter, 1.0) * share**power
    return shares


def _projection(student: Encoder) -> Iterable[nn.Parameter]:
    dense = [layer for layer in student.head if isinstance(layer, Dense)]
    return dense[-1].parameters() if dense else ()


def _token_weights(student: Encoder) -> Iterable[nn.Parameter]:
    return [student.backbone.weights] if isinstance(student.backbone, StaticTable) else []


def _table(student: Encoder) -> Iterable[nn.Parameter]:
    if isinstance(student.backbone, StaticTable):
        return [student.backbone.table]
    return student.backbone.model.get_input_embeddings().parameters()


def _layers_above(student: Encoder) -> dict[nn.Parameter, int]:
    """How many layers stand above a parameter; of embeddings, which models register before their layers, all of them do."""
    if not isinstance(student.backbone, TransformerBackbone):
        return {}
    model = student.backbone.model
    total = model.config.num_hidden_layers
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == total]
    if len(lists) != 1:
        return {}
    above = {p: total - 1 - number for number, layer in enumerate(lists[0]) for p in layer.parameters()}
    below = takewhile(lambda parameter: parameter not in above, model.parameters())
    return dict.fromkeys(below, total) | above
