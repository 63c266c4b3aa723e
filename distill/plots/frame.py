"""What all figures share: colours, a figure of no window, plain axes, texts of one line."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import matplotlib.axes
    import matplotlib.figure

COLOURS = ("#0b5394", "#c4550a", "#3a7d34", "#7a3e9d", "#555555")  # as dark as each other, so told apart by marker too
MARKERS = ("o", "s", "^", "D", "v")
LABEL_CHARACTERS = 34


def blank(width: float, height: float) -> "matplotlib.figure.Figure":
    """A figure of no window and no pyplot: nothing has to be closed, and nothing is drawn twice."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=90, layout="constrained")


def plain(ax: "matplotlib.axes.Axes", *, legend: bool) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="#dddddd", linewidth=0.6)
    ax.set_axisbelow(True)
    if legend:
        ax.legend(frameon=False, fontsize=8)


def short(text: str) -> str:
    """One line of at most 34 characters; a $ is a $, not mathematics."""
    line = " ".join(text.split())
    line = line if len(line) <= LABEL_CHARACTERS else line[: LABEL_CHARACTERS - 1].rstrip() + "…"
    return line.replace("$", r"\$")
