"""Values against steps, sizes and tasks, and scores with their intervals."""

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from distill import runlog
from distill.errors import DataError
from distill.metrics import Interval
from distill.plots.frame import COLOURS, MARKERS, blank, plain, short

if TYPE_CHECKING:
    import matplotlib.axes
    import matplotlib.figure


def cost_curve(
    seconds: Mapping[str, Mapping[int, float]],
    allocated: Mapping[str, Mapping[int, float]],
) -> "matplotlib.figure.Figure":
    """Time and allocated bytes against size, one line a method, {method: {size: value}}; both axes are logarithmic."""
    figure = blank(7.5, 2.8)
    panels = zip(
        figure.subplots(1, 2), (seconds, allocated), ("milliseconds", "megabytes allocated"), (1e3, 1e-6), strict=True
    )
    for ax, curves, label, factor in panels:
        _draw_curves(
            ax, {name: {size: value * factor for size, value in curve.items()} for name, curve in curves.items()}
        )
        ax.set(xlabel="rows on each side (b = n)", ylabel=label)
    return figure


def loss_curve(metrics: str | Path, *, title: str = "") -> "matplotlib.figure.Figure":
    """The loss of each step of a run, and the parts of a sum of losses, from its metrics.jsonl (or the run's folder)."""
    path = Path(metrics)
    path = path / runlog.NAME if path.is_dir() else path
    entries = runlog.read(path)
    if not entries or "loss" not in entries[0]:
        raise DataError(
            f"{path} is not there, or holds no finished step: a run writes lines with step and loss into the {runlog.NAME} of "
            "its output folder."
        )
    figure = blank(5.0, 2.6)
    ax = figure.add_subplot()
    logged = dict.fromkeys(name for entry in entries for name in entry)  # a term may begin later
    names = [name for name in logged if name == "loss" or name.startswith("loss/")]
    for name, colour in zip(names, COLOURS * len(names), strict=False):
        line = [entry.get(name, math.nan) for entry in entries]
        ax.plot([entry["step"] for entry in entries], line, color=colour, label=name.removeprefix("loss/"))
    ax.set(xlabel="step", ylabel="loss")
    ax.set_title(title, fontsize=10)
    plain(ax, legend=len(names) > 1)
    return figure


def lines(
    curves: Mapping[str, Mapping[float, float]],
    *,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    marks: bool = True,
) -> "matplotlib.figure.Figure":
    """One line for each name, {name: {x: y}}; five at most, told apart by colour and marker."""
    if not 1 <= len(curves) <= len(COLOURS):
        raise ValueError(f"lines draws 1 to {len(COLOURS)} curves, got {len(curves)}.")
    figure = blank(5.0, 2.8)
    ax = figure.add_subplot()
    for (name, curve), colour, marker in zip(curves.items(), COLOURS, MARKERS, strict=False):
        ax.plot(
            list(curve), list(curve.values()), color=colour, marker=marker if marks else "", markersize=4, label=name
        )
    ax.set_xscale("log" if log_x else "linear")
    ax.set(xlabel=x_label, ylabel=y_label)
    plain(ax, legend=len(curves) > 1)
    return figure


def intervals(scores: Mapping[str, Interval], *, x_label: str) -> "matplotlib.figure.Figure":
    """A score of some systems, one below the other: a dot, its interval, and its number."""
    figure = blank(6.0, 0.7 + 0.36 * len(scores))
    ax = figure.add_subplot()
    for place, score in enumerate(scores.values()):
        ax.plot([score.low, score.high], [place, place], color=COLOURS[0], linewidth=2, solid_capstyle="butt")
        ax.plot(score.value, place, "o", color=COLOURS[0], markersize=6)
        ax.annotate(
            f"{score.value:.3f}", (score.value, place), (0, 6), textcoords="offset points", ha="center", fontsize=8
        )
    ax.set_yticks(range(len(scores)), [short(name) for name in scores])
    ax.set(xlabel=x_label, ylim=(len(scores) - 0.5, -0.7))
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x", color="#dddddd", linewidth=0.6)
    ax.set_axisbelow(True)
    return figure


def accuracy_over_tasks(
    seen: Mapping[str, Float[Tensor, "seeds s"]], *, classes_a_task: Sequence[int] | None = None
) -> "matplotlib.figure.Figure":
    """Accuracy on all classes seen so far, after each task: the mean over seeds as a line, their lowest and highest as a band."""
    figure = blank(5.0, 3.0)
    ax = figure.add_subplot()
    tasks = next(iter(seen.values())).shape[1]
    places = list(range(1, tasks + 1)) if classes_a_task is None else list(itertools.accumulate(classes_a_task))
    for (name, values), colour, marker in zip(seen.items(), COLOURS, MARKERS, strict=False):
        percent = 100 * values.detach().double()
        ax.plot(places, percent.mean(0), color=colour, marker=marker, markersize=4, label=name)
        ax.fill_between(places, percent.amin(0), percent.amax(0), color=colour, alpha=0.2, linewidth=0)
    ax.set_xticks(places)
    ax.set(xlabel="tasks learned" if classes_a_task is None else "classes learned", ylabel="accuracy on them, %")
    ax.set_ylim(0, 100)
    plain(ax, legend=True)
    return figure


def _draw_curves(ax: "matplotlib.axes.Axes", curves: Mapping[str, Mapping[int, float]]) -> None:
    styles = zip(COLOURS, MARKERS, strict=True)
    for (name, curve), (colour, marker) in zip(curves.items(), styles, strict=False):
        ax.plot(list(curve), list(curve.values()), color=colour, marker=marker, markersize=4, label=name)
    sizes = sorted({size for curve in curves.values() for size in curve})
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks(sizes, [f"{size:,}" for size in sizes])
    ax.tick_params(labelsize=8)
    plain(ax, legend=True)
