"""Figures for notebooks: each function returns a matplotlib Figure and shows nothing; matplotlib is imported when one is drawn.

Cosines go from light to dark in one colour, so that a figure reads the same in grey, and one scale serves all panels of a figure.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from distill.errors import DataError

if TYPE_CHECKING:
    import matplotlib.axes
    import matplotlib.figure
    import matplotlib.image

COLOURS = ("#0b5394", "#c4550a", "#3a7d34", "#7a3e9d", "#555555")  # as dark as each other, so told apart by marker too
MARKERS = ("o", "s", "^", "D", "v")
LIGHT_TO_DARK = "YlGnBu"
LABEL_CHARACTERS = 34
CELLS_INCHES = 6.0  # of the longer side of a single matrix
PRINTED_CELLS = 150  # of a matrix; more are too small for a number


def similarity_heatmap(
    matrix: Float[Tensor, "b n"],
    *,
    rows: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    title: str = "",
    limits: tuple[float, float] | None = None,
    ax: "matplotlib.axes.Axes | None" = None,
) -> "matplotlib.figure.Figure":
    """A matrix of cosines as a heat map. Long texts end in an ellipsis; a small matrix has its values printed in the cells.

    `limits` are the cosines of the lightest and the darkest colour, by default the matrix's own. With `ax` it is drawn
    there, without a colour bar, and the figure of `ax` is returned.
    """
    _check_labels(matrix, rows, columns)
    limits = limits or _limits([matrix])
    if ax is not None:
        _draw_matrix(ax, matrix, rows, columns, title, limits)
        return _figure_of(ax)
    height, width = (min(0.45, CELLS_INCHES / max(matrix.shape)) * size for size in matrix.shape)
    figure = _figure(width + 1.2 + 2.3 * bool(rows), max(height, 1.5) + 0.5 + 2.0 * bool(columns))
    ax = figure.add_subplot()
    figure.colorbar(_draw_matrix(ax, matrix, rows, columns, title, limits), ax=ax, label="cosine")
    return figure


def similarity_heatmaps(
    matrices: Mapping[str, Float[Tensor, "b n"]],
    *,
    rows: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    panel_inches: float = 2.8,
) -> "matplotlib.figure.Figure":
    """Several matrices side by side on one colour scale, each under its name; row texts stand at the left one alone."""
    if not matrices:
        raise ValueError("similarity_heatmaps draws one matrix or more, got none.")
    for matrix in matrices.values():
        _check_labels(matrix, rows, columns)
    limits = _limits(list(matrices.values()))
    width = panel_inches * len(matrices) + 0.8 + 2.2 * bool(rows)
    figure = _figure(width, panel_inches + 0.5 + 1.8 * bool(columns))
    axes = figure.subplots(1, len(matrices), squeeze=False)[0]
    for number, (ax, (name, matrix)) in enumerate(zip(axes, matrices.items(), strict=True)):
        image = _draw_matrix(ax, matrix, None if number else rows, columns, name, limits)
    figure.colorbar(image, ax=list(axes), label="cosine", shrink=0.9)
    return figure


def cost_curve(
    seconds: Mapping[str, Mapping[int, float]],
    allocated: Mapping[str, Mapping[int, float]],
    *,
    size_label: str = "rows on each side (b = n)",
) -> "matplotlib.figure.Figure":
    """Time and allocated bytes against size, one line a method, {method: {size: value}}; both axes are logarithmic."""
    figure = _figure(7.5, 2.8)
    panels = zip(
        figure.subplots(1, 2), (seconds, allocated), ("milliseconds", "megabytes allocated"), (1e3, 1e-6), strict=True
    )
    for ax, curves, label, factor in panels:
        _draw_curves(
            ax, {name: {size: value * factor for size, value in curve.items()} for name, curve in curves.items()}
        )
        ax.set(xlabel=size_label, ylabel=label)
    return figure


def loss_curve(metrics: str | Path, *, title: str = "") -> "matplotlib.figure.Figure":
    """The loss of each step of a run, and the parts of a sum of losses, from its metrics.jsonl (or the run's folder)."""
    path = Path(metrics)
    entries = read_metrics(path / "metrics.jsonl" if path.is_dir() else path)
    figure = _figure(5.0, 2.6)
    ax = figure.add_subplot()
    logged = dict.fromkeys(name for entry in entries for name in entry)  # a term may begin later
    names = [name for name in logged if name == "loss" or name.startswith("loss/")]
    for name, colour in zip(names, COLOURS * len(names), strict=False):
        line = [entry.get(name, math.nan) for entry in entries]
        ax.plot([entry["step"] for entry in entries], line, color=colour, label=name.removeprefix("loss/"))
    ax.set(xlabel="step", ylabel="loss")
    ax.set_title(title, fontsize=10)
    _plain(ax, legend=len(names) > 1)
    return figure


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The steps of a metrics.jsonl, one JSON object a line; the last line may be half written while the run goes on."""
    if not path.exists():
        raise DataError(f"{path} does not exist. A run writes metrics.jsonl into its output folder.")
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    entries = []
    for number, line in enumerate(lines, start=1):
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines) and not line.endswith("\n"):
                break
            raise DataError(f"{path}, line {number} is no JSON: {line[:80]!r}.") from error
    if not entries or not {"step", "loss"} <= set(entries[0]):
        raise DataError(f"{path} holds no finished step yet; expected lines with step and loss.")
    return entries


# Parts


def _draw_matrix(
    ax: "matplotlib.axes.Axes",
    matrix: Tensor,
    rows: Sequence[str] | None,
    columns: Sequence[str] | None,
    title: str,
    limits: tuple[float, float],
) -> "matplotlib.image.AxesImage":
    values = matrix.detach().float().cpu().numpy()
    image = ax.imshow(values, cmap=LIGHT_TO_DARK, vmin=limits[0], vmax=limits[1], interpolation="nearest")
    ax.set_title(title.replace("$", r"\$"), fontsize=10)
    ax.tick_params(length=0, labelsize=7)
    ax.spines[:].set_visible(False)
    ax.set_yticks(*_ticks(rows))
    ax.set_xticks(*_ticks(columns), rotation=90)
    if values.size <= PRINTED_CELLS:
        _print_values(ax, image, values)
    return image


def _print_values(ax: "matplotlib.axes.Axes", image: "matplotlib.image.AxesImage", values: np.ndarray) -> None:
    for (row, column), value in np.ndenumerate(values):
        red, green, blue, _ = image.cmap(image.norm(value))
        colour = "black" if 0.3 * red + 0.59 * green + 0.11 * blue > 0.5 else "white"
        ax.text(column, row, f"{round(float(value), 2) + 0.0:.2f}", ha="center", va="center", fontsize=7, color=colour)


def _draw_curves(ax: "matplotlib.axes.Axes", curves: Mapping[str, Mapping[int, float]]) -> None:
    styles = zip(COLOURS, MARKERS, strict=True)
    for (name, curve), (colour, marker) in zip(curves.items(), styles, strict=False):
        ax.plot(list(curve), list(curve.values()), color=colour, marker=marker, markersize=4, label=name)
    sizes = sorted({size for curve in curves.values() for size in curve})
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks(sizes, [f"{size:,}" for size in sizes])
    ax.tick_params(labelsize=8)
    _plain(ax, legend=True)


def _plain(ax: "matplotlib.axes.Axes", *, legend: bool) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="#dddddd", linewidth=0.6)
    ax.set_axisbelow(True)
    if legend:
        ax.legend(frameon=False, fontsize=8)


def _figure(width: float, height: float) -> "matplotlib.figure.Figure":
    """A figure of no window and no pyplot: nothing has to be closed, and nothing is drawn twice."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=90, layout="constrained")


def _figure_of(ax: "matplotlib.axes.Axes") -> "matplotlib.figure.Figure":
    figure = ax.get_figure(root=True)
    if figure is None:
        raise ValueError("similarity_heatmap got an ax that belongs to no figure. Make it with figure.add_subplot().")
    return figure


def _limits(matrices: Sequence[Tensor]) -> tuple[float, float]:
    """The lowest and the highest finite value of all of them."""
    values = torch.cat([matrix.detach().float().cpu().flatten() for matrix in matrices])
    values = values[values.isfinite()]
    if not len(values):
        raise ValueError("a heat map needs a finite value, got NaN and infinity alone.")
    lowest, highest = float(values.min()), float(values.max())
    return (lowest, highest) if lowest < highest else (lowest - 0.5, highest + 0.5)


def _ticks(labels: Sequence[str] | None) -> tuple[list[int], list[str]]:
    return list(range(len(labels or ()))), [_short(label) for label in labels or ()]


def _short(text: str) -> str:
    """One line of at most 34 characters; a $ is a $, not mathematics."""
    line = " ".join(text.split())
    line = line if len(line) <= LABEL_CHARACTERS else line[: LABEL_CHARACTERS - 1].rstrip() + "…"
    return line.replace("$", r"\$")


def _check_labels(matrix: Tensor, rows: Sequence[str] | None, columns: Sequence[str] | None) -> None:
    if matrix.ndim != 2 or not matrix.numel():
        raise ValueError(f"a heat map needs a matrix with rows and columns, got shape {tuple(matrix.shape)}.")
    for name, labels, size in (("rows", rows, matrix.shape[0]), ("columns", columns, matrix.shape[1])):
        if labels is not None and len(labels) != size:
            raise ValueError(
                f"a matrix of shape {tuple(matrix.shape)} has {size} {name}, got {len(labels)} texts for them."
            )
