"""Points on the unit circle: students beside a teacher and where a loss pulls them, classes and their proxies."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from distill.plots.frame import COLOURS, MARKERS, blank
from distill.similarity import normalize

if TYPE_CHECKING:
    import matplotlib.axes
    import matplotlib.figure

LONGEST_ARROW = 0.6  # of a panel, in radii of its circle


def circles(
    students: Mapping[str, Float[Tensor, "*steps b 2"]],
    teacher: Float[Tensor, "b 2"],
    pulls: Mapping[str, Float[Tensor, "b 2"]] | None = None,
    *,
    columns: int = 4,
) -> "matplotlib.figure.Figure":
    """Students in the plane beside one teacher, a panel each under its name: numbered dots, the teacher's as rings, on the unit circle.

    `pulls` are arrows, such as minus the gradient; the longest of a panel has one length in all of them, and a panel whose pulls
    are below 1e-6 has none. With an axis of steps the dots are where a student ends, on the line of its way.
    """
    if not students or (pulls is not None and pulls.keys() != students.keys()):
        raise ValueError(f"circles draws one student or more, with pulls for each or none, got {[*students]}.")
    rows = -(-len(students) // columns)
    columns = min(columns, len(students))
    figure = blank(2.2 * columns, 2.35 * rows + 0.3) if len(students) > 1 else blank(3.0, 3.4)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for ax, (name, points) in zip(axes, students.items(), strict=False):
        _draw_circle(ax, name)
        _draw_teacher(ax, teacher.detach().float())
        _draw_students(ax, points.detach().float(), None if pulls is None else pulls[name].detach().float())
    for ax in axes[len(students) :]:
        ax.set_axis_off()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return figure


def classes_on_circle(
    points: Float[Tensor, "n 2"],
    labels: Int[Tensor, "n"],
    proxies: Mapping[str, Float[Tensor, "cp 2"]],
    *,
    nb_proxy: Mapping[str, int] | None = None,
) -> "matplotlib.figure.Figure":
    """Points of some classes on the unit circle and the directions of their proxies (class-major), a panel for each set of proxies.

    A class's arrows are a little shorter than those of the class before, so that none hides another.
    """
    figure = blank(max(4.4, 2.7 * len(proxies)), 3.2)
    axes = figure.subplots(1, len(proxies), squeeze=False)[0]
    styles = list(zip(COLOURS, MARKERS, strict=True))
    for ax, (name, weight) in zip(axes, proxies.items(), strict=True):
        _draw_circle(ax, name, room=1.15)
        each = (nb_proxy or {}).get(name, 1)
        directions = normalize(weight.detach()).cpu().numpy()
        for label in range(len(weight) // each):
            colour, marker = styles[label % len(styles)]
            xs, ys = points[labels == label].T.cpu().numpy()
            ax.scatter(xs, ys, s=22, color=colour, marker=marker, label=f"class {label}")
            length = 0.88 - 0.09 * (label % len(styles))
            for x, y in length * directions[label * each : (label + 1) * each]:
                ax.annotate("", (x, y), (0, 0), arrowprops={"arrowstyle": "-|>", "color": colour, "lw": 1.8})
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    return figure


def _draw_circle(ax: "matplotlib.axes.Axes", title: str, room: float = 1.45) -> None:
    turn = np.linspace(0, 2 * np.pi, 181)
    ax.plot(np.cos(turn), np.sin(turn), color="#cccccc", linewidth=0.8, zorder=0)
    ax.set_title(title, fontsize=9)
    ax.set(xlim=(-room, room), ylim=(-room, room), aspect="equal")
    ax.set_axis_off()


def _draw_teacher(ax: "matplotlib.axes.Axes", points: Tensor) -> None:
    xs, ys = points.T.cpu().numpy()
    ax.scatter(xs, ys, s=60, facecolors="none", edgecolors=COLOURS[1], label="teacher")
    for number, (x, y) in enumerate(points.tolist(), start=1):
        ax.text(1.26 * x, 1.26 * y, str(number), ha="center", va="center", fontsize=7, color=COLOURS[1])


def _draw_students(ax: "matplotlib.axes.Axes", points: Tensor, pulls: Tensor | None) -> None:
    if points.ndim == 3:
        for way in points.transpose(0, 1):
            ax.plot(*way.T.cpu().numpy(), color=COLOURS[0], linewidth=1.5, alpha=0.45)
        points = points[-1]
    xs, ys = points.T.cpu().numpy()
    ax.scatter(xs, ys, s=20, color=COLOURS[0], label="student", zorder=3)
    for number, (x, y) in enumerate(points.tolist(), start=1):
        ax.text(0.77 * x, 0.77 * y, str(number), ha="center", va="center", fontsize=7, color=COLOURS[0])
    if pulls is not None and (longest := float(pulls.norm(dim=-1).max())) > 1e-6:
        for (x, y), (dx, dy) in zip(points.tolist(), (LONGEST_ARROW * pulls / longest).tolist(), strict=True):
            if math.hypot(dx, dy) < 0.05 * LONGEST_ARROW:  # shorter than its own head
                continue
            style = {
                "arrowstyle": "-|>",
                "color": COLOURS[0],
                "lw": 1.6,
                "shrinkA": 0,
                "shrinkB": 0,
                "mutation_scale": 8,
            }
            ax.annotate("", (x + dx, y + dy), (x, y), arrowprops=style)
