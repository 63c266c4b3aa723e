"""A running average of the weights beside the weights themselves: a short run ends better there than where it happens to stop."""

import torch
from torch import Tensor, nn


class WeightAverage:
    """Exponential moving average of a module's trained parameters; the module keeps its own until `apply`.

    After step t (from 0) the average goes the share 1 - min(decay, (1 + t) / (10 + t)) of its way to the weights. With this
    warm-up a run of less than some 9 / (1 - decay) steps ends as an average of about its last ninth, whatever its length; a
    bias-corrected average would count the first steps of such a run, its worst, nearly as much as the last ones.
    A function of the weights and the step alone: processes that hold the same weights hold the same average, and no one
    has to send it. Cost: one pass over the weights a step, and their memory once more.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        if not 0 < decay < 1:
            raise ValueError(
                f"WeightAverage needs a decay between 0 and 1, got {decay}. Try 0.99, or 0.999 for long runs."
            )
        self.decay = decay
        self._parameters = {name: value for name, value in module.named_parameters() if value.requires_grad}
        self.tensors = {name: value.detach().clone() for name, value in self._parameters.items()}
        self._handed_over: set[str] = set()

    def share(self, step: int) -> float:
        """How much of its way to the weights the average goes at step `step`, from 0."""
        return 1 - min(self.decay, (1 + step) / (10 + step))

    def hand_over(self, parameter: nn.Parameter) -> Tensor:
        """The average of a parameter, which the caller keeps from now on: `update` leaves it as it is."""
        name = next(name for name, value in self._parameters.items() if value is parameter)
        self._handed_over.add(name)
        return self.tensors[name]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights as step `step`, from 0, has left them."""
        here = [name for name in self.tensors if name not in self._handed_over]
        weights = [self._parameters[name].detach() for name in here]
        if here:
            torch._foreach_lerp_([self.tensors[name] for name in here], weights, self.share(step))

    @torch.no_grad()
    def apply(self) -> None:
        """Give the module the average for its weights."""
        torch._foreach_copy_(self._weights(), list(self.tensors.values()))

    def _weights(self) -> list[Tensor]:
        return [parameter.detach() for parameter in self._parameters.values()]
