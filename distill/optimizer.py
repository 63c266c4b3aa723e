"""AdamW over a student's parameters, and the share of its learning rate at each step."""

from collections.abc import Callable

import torch
from torch import nn

from distill.heads import parameter_groups
from distill.settings import TrainConfig


def adamw(student: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Fused AdamW; matrices decay, vectors do not."""
    rate, decay = config.learning_rate, config.weight_decay
    groups = parameter_groups(student, lr=rate, sigma_lr=rate, weight_decay=decay)
    return torch.optim.AdamW(groups, lr=rate, fused=True)


def rate_of(optimizer: torch.optim.Optimizer, config: TrainConfig, steps: int) -> Callable[[float], float]:
    """The share of the learning rate at a step: a function of the step alone, so that nothing of it has to be saved."""
    from transformers import get_scheduler

    name = "constant_with_warmup" if config.schedule == "constant" else config.schedule
    warmup = round(config.warmup_fraction * steps)
    return get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=steps).lr_lambdas[0]
