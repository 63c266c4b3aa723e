"""Classes that arrive task after task: what is known after each task, and what was known once and is not any more.

Both read a matrix of accuracies, row t after task t, column k on the test texts of task k. What stands above the diagonal is
of tasks that are still to come; it is not read, and may be NaN.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def seen_accuracy(accuracy: Float[Tensor, "s s"], counts: Int[Tensor, "s"] | None = None) -> Float[Tensor, "s"]:
    """After each task, the accuracy on the test texts of all tasks so far.

    Equals sum_k<=t counts_k * accuracy_tk / sum_k<=t counts_k; without `counts`, test texts a task, all tasks are of one size.
    """
    size = len(_checked("seen_accuracy", accuracy))
    weights = torch.ones(size, dtype=torch.float64) if counts is None else counts.double().cpu()
    if weights.shape != (size,) or not (weights > 0).all():
        raise ValueError(
            f"seen_accuracy takes the number of test texts of each of {size} tasks, above 0, got {weights.tolist()}."
        )
    return accuracy.double().cpu().masked_fill(~_learned(size), 0.0) @ weights / weights.cumsum(0)


def average_incremental_accuracy(accuracy: Float[Tensor, "s s"], counts: Int[Tensor, "s"] | None = None) -> float:
    """The mean over tasks of `seen_accuracy`, the first task included. Rebuffi et al. 2017 (iCaRL)."""
    return float(seen_accuracy(accuracy, counts).mean())


def forgetting(accuracy: Float[Tensor, "s s"]) -> float:
    """How much lower the accuracy on a task is after the last one than it was at its best before; the mean over all but the last.

    Equals mean over k < s of max_{k <= t < s} accuracy_tk - accuracy_sk; below 0 where later tasks helped. A model that learned
    nothing forgets nothing: read it beside the accuracy. Chaudhry et al. 2018.
    """
    values = _checked("forgetting", accuracy).double().cpu()
    if len(values) < 2:
        raise ValueError("forgetting compares tasks with later ones, got one task.")
    best = values.masked_fill(~_learned(len(values)), -torch.inf)[:-1, :-1].amax(0)
    return float((best - values[-1, :-1]).mean())


def _checked(caller: str, accuracy: Tensor) -> Tensor:
    if accuracy.ndim != 2 or accuracy.shape[0] != accuracy.shape[1] or not len(accuracy):
        raise ValueError(
            f"{caller} takes a square matrix, a row and a column for each task, got {tuple(accuracy.shape)}."
        )
    if not accuracy[_learned(len(accuracy)).to(accuracy.device)].isfinite().all():
        raise ValueError(f"{caller} needs a number for each task and those before it, got NaN or infinity among them.")
    return accuracy


def _learned(tasks: int) -> Bool[Tensor, "tasks tasks"]:
    """Whether column k, a task, was learned when row t was measured."""
    return torch.ones(tasks, tasks, dtype=torch.bool).tril()
