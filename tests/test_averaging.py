"""The running average against its recursion, and what its warm-up is for."""

import pytest
import torch
from torch import nn

from distill.training.averaging import WeightAverage


def walked(module: nn.Module, average: WeightAverage, steps: int) -> list[dict[str, torch.Tensor]]:
    """The module's weights after each of some random steps that the average took in."""
    seen = []
    for step in range(steps):
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.data.add_(torch.randn_like(parameter))
        average.update(step)
        seen.append({name: value.detach().clone() for name, value in module.named_parameters()})
    return seen


@pytest.mark.parametrize("decay", [0.5, 0.999])
def test_the_average_is_its_recursion_with_the_warm_up(decay: float) -> None:
    module = nn.Sequential(nn.Linear(5, 3), nn.LayerNorm(3)).double()
    expected = {name: value.detach().clone() for name, value in module.named_parameters()}
    average = WeightAverage(module, decay)
    for step, weights in enumerate(walked(module, average, 30)):
        kept = min(decay, (1 + step) / (10 + step))
        expected = {name: kept * expected[name] + (1 - kept) * weights[name] for name in expected}
    assert average.tensors.keys() == expected.keys()
    for name, value in average.tensors.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-12)


def test_the_module_keeps_its_own_weights_until_the_average_is_applied() -> None:
    module = nn.Linear(4, 2)
    module.bias.requires_grad_(False)
    bias = module.bias.clone()
    average = WeightAverage(module, 0.9)
    last = walked(module, average, 5)[-1]
    assert torch.equal(module.weight, last["weight"])
    assert not torch.equal(average.tensors["weight"], last["weight"])
    average.apply()
    assert torch.equal(module.weight, average.tensors["weight"])
    assert torch.equal(module.bias, bias)
    assert module.weight.requires_grad
    assert set(average.tensors) == {"weight"}


def test_an_average_that_another_keeps_is_left_to_it() -> None:
    module = nn.Linear(4, 2, bias=False)
    average = WeightAverage(module, 0.9)
    theirs, before = average.hand_over(module.weight), module.weight.detach().clone()
    walked(module, average, 3)
    assert torch.equal(theirs, before)
    theirs.fill_(1.0)
    average.apply()
    assert torch.equal(module.weight, torch.ones(2, 4))


def test_tied_weights_are_averaged_once() -> None:
    module = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False), "b": nn.Linear(3, 3, bias=False)})
    module["b"].weight = module["a"].weight
    average = WeightAverage(module, 0.9)
    walked(module, average, 3)
    assert len(average.tensors) == 1
    average.apply()
    assert module["a"].weight is module["b"].weight
    assert torch.equal(module["b"].weight, average.tensors["a.weight"])


def lag(decay: float, steps: int) -> float:
    """How many steps the average is behind, on a weight that rises by 1 a step."""
    module = nn.Linear(1, 1, bias=False).double()
    average = WeightAverage(module, decay)
    for step in range(steps):
        module.weight.data.fill_(step)
        average.update(step)
    return steps - 1 - float(average.tensors["weight"])


def test_a_short_run_ends_as_an_average_of_its_end_and_a_long_one_by_its_decay() -> None:
    assert lag(0.9999, 300) == pytest.approx(30, rel=0.1)  # bias-corrected it would be 149
    assert lag(0.9999, 600) == pytest.approx(60, rel=0.1)
    assert lag(0.9, 600) == pytest.approx(0.9 / (1 - 0.9), rel=1e-6)


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.5, float("nan")])
def test_a_decay_that_averages_nothing_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1, got"):
        WeightAverage(nn.Linear(2, 2), decay)
