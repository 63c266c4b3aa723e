"""Matrices as heat maps.

Cosines go from light to dark in one colour, so that a figure reads the same in grey, and one scale serves all panels of a figure.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from distill.plots.frame import blank, short

if TYPE_CHECKING:
    import matplotlib.axes
    import matplotlib.figure
    import matplotlib.image

LIGHT_TO_DARK = "YlGnBu"
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
    figure = blank(width + 1.2 + 2.3 * bool(rows), max(height, 1.5) + 0.5 + 2.0 * bool(columns))
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
    figure = blank(width, panel_inches + 0.5 + 1.8 * bool(columns))
    axes = figure.subplots(1, len(matrices), squeeze=False)[0]
    for number, (ax, (name, matrix)) in enumerate(zip(axes, matrices.items(), strict=True)):
        image = _draw_matrix(ax, matrix, None if number else rows, columns, name, limits)
    figure.colorbar(image, ax=list(axes), label="cosine", shrink=0.9)
    return figure


def accuracy_matrices(
    matrices: Mapping[str, Float[Tensor, "s s"]], *, panel_inches: float = 2.9
) -> "matplotlib.figure.Figure":
    """Accuracies over tasks, a panel for each way of learning: row t after task t, column k on task k, in percent.

    What stands above the diagonal, of tasks still to come, is left empty.
    """
    if not matrices:
        raise ValueError("accuracy_matrices draws one matrix or more, got none.")
    figure = blank(panel_inches * len(matrices) + 0.9, panel_inches + 0.3)
    axes = figure.subplots(1, len(matrices), squeeze=False)[0]
    for ax, (name, matrix) in zip(axes, matrices.items(), strict=True):
        known = torch.ones_like(matrix, dtype=torch.bool).tril()
        values = matrix.detach().float().masked_fill(~known, math.nan)
        image = _draw_matrix(ax, 100 * values, None, None, name, (0.0, 100.0), digits=0)
        numbers = range(len(matrix))
        ax.set_xticks(numbers, [str(number + 1) for number in numbers])
        ax.set_yticks(numbers, [str(number + 1) for number in numbers])
        ax.set(xlabel="test texts of task", ylabel="after task" if ax is axes[0] else "")
    figure.colorbar(image, ax=list(axes), label="accuracy, %", shrink=0.9)
    return figure


def _draw_matrix(
    ax: "matplotlib.axes.Axes",
    matrix: Tensor,
    rows: Sequence[str] | None,
    columns: Sequence[str] | None,
    title: str,
    limits: tuple[float, float],
    *,
    digits: int = 2,
) -> "matplotlib.image.AxesImage":
    values = matrix.detach().float().cpu().numpy()
    image = ax.imshow(values, cmap=LIGHT_TO_DARK, vmin=limits[0], vmax=limits[1], interpolation="nearest")
    ax.set_title(title.replace("$", r"\$"), fontsize=10)
    ax.tick_params(length=0, labelsize=7)
    ax.spines[:].set_visible(False)
    ax.set_yticks(*_ticks(rows))
    ax.set_xticks(*_ticks(columns), rotation=90)
    if values.size <= PRINTED_CELLS:
        _print_values(ax, image, values, digits)
    return image


def _print_values(
    ax: "matplotlib.axes.Axes", image: "matplotlib.image.AxesImage", values: np.ndarray, digits: int
) -> None:
    for (row, column), value in np.ndenumerate(values):
        if np.isnan(value):
            continue
        red, green, blue, _ = image.cmap(image.norm(value))
        colour = "black" if 0.3 * red + 0.59 * green + 0.11 * blue > 0.5 else "white"
        ax.text(
            column,
            row,
            f"{round(float(value), digits) + 0.0:.{digits}f}",
            ha="center",
            va="center",
            fontsize=7,
            color=colour,
        )


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
    return list(range(len(labels or ()))), [short(label) for label in labels or ()]


def _check_labels(matrix: Tensor, rows: Sequence[str] | None, columns: Sequence[str] | None) -> None:
    if matrix.ndim != 2 or not matrix.numel():
        raise ValueError(f"a heat map needs a matrix with rows and columns, got shape {tuple(matrix.shape)}.")
    for name, labels, size in (("rows", rows, matrix.shape[0]), ("columns", columns, matrix.shape[1])):
        if labels is not None and len(labels) != size:
            raise ValueError(
                f"a matrix of shape {tuple(matrix.shape)} has {size} {name}, got {len(labels)} texts for them."
            )
