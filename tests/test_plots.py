"""Figures say what they draw: texts, values, one scale, nothing on the screen."""

import json
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure

from distill import plots
from distill.errors import DataError

LONG = "A summary line that is far too long to stand beside a row of a heat map."


def cosines(rows: int, columns: int) -> torch.Tensor:
    return torch.rand(rows, columns) * 2 - 1


def texts(labels: list) -> list[str]:
    return [label.get_text() for label in labels]


def test_a_small_matrix_has_its_texts_and_its_values() -> None:
    matrix = torch.tensor([[1.0, -0.001, 0.5], [0.25, 1.0, -0.75]])
    figure = plots.similarity_heatmap(matrix, rows=["one", LONG], columns=["a", "b", "$c"], title="cost in $")
    ax, bar = figure.axes
    assert texts(ax.texts) == ["1.00", "0.00", "0.50", "0.25", "1.00", "-0.75"]
    assert texts(ax.get_yticklabels()) == ["one", "A summary line that is far too lo…"]
    assert texts(ax.get_xticklabels()) == ["a", "b", r"\$c"]
    assert bar.get_ylabel() == "cosine"
    figure.savefig(BytesIO(), format="png")


def test_values_are_printed_in_a_colour_that_stands_out() -> None:
    ax = plots.similarity_heatmap(torch.tensor([[0.0, 1.0]])).axes[0]
    assert [text.get_color() for text in ax.texts] == ["black", "white"]


def test_a_large_matrix_has_colours_alone() -> None:
    assert not plots.similarity_heatmap(cosines(40, 60)).axes[0].texts


@pytest.mark.parametrize("shape", [(1, 1), (1, 200), (200, 1), (3, 300)])
def test_all_shapes_are_drawn(shape: tuple[int, int], tmp_path: Path) -> None:
    figure = plots.similarity_heatmap(cosines(*shape), rows=["text"] * shape[0])
    figure.savefig(tmp_path / "figure.png")
    assert max(figure.get_size_inches()) < 12


def test_values_of_any_type_and_without_order_are_drawn() -> None:
    plots.similarity_heatmap(cosines(2, 3).bfloat16().requires_grad_())
    figure = plots.similarity_heatmap(torch.tensor([[float("nan"), 0.5]]))
    assert figure.axes[0].images[0].get_clim() == (0.0, 1.0)
    with pytest.raises(ValueError, match="finite value"):
        plots.similarity_heatmap(torch.full((2, 2), float("nan")))


def test_panels_share_one_scale_and_the_row_texts_stand_once() -> None:
    matrices = {"before": cosines(3, 4) / 10, "after": cosines(3, 4), "teacher": torch.eye(3, 4)}
    *panels, bar = plots.similarity_heatmaps(matrices, rows=["a", "b", "c"], columns=list("wxyz")).axes
    assert len({panel.images[0].get_clim() for panel in panels}) == 1
    assert [panel.get_title() for panel in panels] == list(matrices)
    assert [texts(panel.get_yticklabels()) for panel in panels] == [["a", "b", "c"], [], []]
    assert all(texts(panel.get_xticklabels()) == list("wxyz") for panel in panels)
    assert bar.get_ylabel() == "cosine"


def test_a_heat_map_can_stand_in_a_figure_of_ones_own() -> None:
    mine = Figure()
    left, _ = mine.subplots(1, 2)
    assert plots.similarity_heatmap(cosines(2, 2), ax=left, limits=(-1.0, 1.0)) is mine
    assert left.images[0].get_clim() == (-1, 1)


def test_colours_grow_darker_with_the_cosine() -> None:
    grey = colormaps[plots.LIGHT_TO_DARK](np.linspace(0, 1, 64))[:, :3] @ [0.299, 0.587, 0.114]
    assert (np.diff(grey) < 0).all()


def test_wrong_labels_are_named() -> None:
    with pytest.raises(ValueError, match=r"has 2 rows, got 1 texts"):
        plots.similarity_heatmap(cosines(2, 3), rows=["one"])
    with pytest.raises(ValueError, match=r"has 3 columns, got 2 texts"):
        plots.similarity_heatmaps({"after": cosines(2, 3)}, columns=["one", "two"])
    with pytest.raises(ValueError, match="one matrix or more"):
        plots.similarity_heatmaps({})


@pytest.mark.usefixtures("unchecked")
def test_what_is_no_matrix_is_named() -> None:
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        plots.similarity_heatmap(torch.rand(3))
    with pytest.raises(ValueError, match=r"shape \(0, 3\)"):
        plots.similarity_heatmap(torch.rand(0, 3))


def test_costs_are_drawn_in_milliseconds_and_megabytes() -> None:
    seconds = {"broadcast": {32: 0.002, 64: 0.016}, "matmul": {32: 0.001, 64: 0.002, 128: 0.004}}
    figure = plots.cost_curve(seconds, {"broadcast": {32: 4e6, 64: 16e6}, "matmul": {32: 1e6}})
    time, memory = figure.axes
    assert [line.get_label() for line in time.lines] == ["broadcast", "matmul"]
    np.testing.assert_allclose(time.lines[1].get_ydata(), [1, 2, 4])
    np.testing.assert_allclose(memory.lines[0].get_ydata(), [4, 16])
    assert texts(time.get_xticklabels()) == ["32", "64", "128"]
    assert {ax.get_yscale() for ax in figure.axes} == {"log"}


def run_folder(tmp_path: Path, *entries: object, end: str = "\n") -> Path:
    lines = [entry if isinstance(entry, str) else json.dumps(entry) for entry in entries]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + end, encoding="utf-8")
    return tmp_path


def test_a_loss_is_drawn_with_its_parts(tmp_path: Path) -> None:
    steps = [{"step": step, "loss": 3 / step, "loss/twin": 1 / step, "lr": 0.1} for step in (1, 2, 3)]
    folder = run_folder(tmp_path, *steps, '{"step": 4, "lo', end="")  # the run is writing its fourth line
    for where in (folder, folder / "metrics.jsonl"):
        total, twin = plots.loss_curve(where).axes[0].lines
        np.testing.assert_allclose(total.get_xydata(), [[1, 3], [2, 1.5], [3, 1]])
        assert (total.get_label(), twin.get_label()) == ("loss", "twin")


def test_a_file_that_is_no_log_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"metrics.jsonl does not exist"):
        plots.loss_curve(tmp_path / "metrics.jsonl")
    with pytest.raises(DataError, match="line 2 is no JSON"):
        plots.loss_curve(run_folder(tmp_path, {"step": 1, "loss": 1.0}, "loss 2", {"step": 3, "loss": 1.0}))
    with pytest.raises(DataError, match="no finished step"):
        plots.loss_curve(run_folder(tmp_path, end=""))


def test_drawing_needs_no_window_and_leaves_pyplot_alone() -> None:
    program = """
import io, sys, torch
from distill import plots
assert "matplotlib" not in sys.modules
plots.similarity_heatmap(torch.rand(2, 2)).savefig(io.BytesIO(), format="png")
assert "matplotlib.pyplot" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
