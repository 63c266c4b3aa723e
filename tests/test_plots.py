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
from distill.metrics import Interval

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
    with pytest.raises(DataError, match=r"metrics.jsonl is not there"):
        plots.loss_curve(tmp_path / "metrics.jsonl")
    with pytest.raises(DataError, match="line 2 is no step"):
        plots.loss_curve(run_folder(tmp_path, {"step": 1, "loss": 1.0}, "loss 2", {"step": 3, "loss": 1.0}))
    with pytest.raises(DataError, match="no finished step"):
        plots.loss_curve(run_folder(tmp_path, end=""))


def on_circle(*degrees: float) -> torch.Tensor:
    turns = torch.tensor(degrees).deg2rad()
    return torch.stack([turns.cos(), turns.sin()], dim=1)


def test_students_stand_on_the_circle_with_arrows_where_they_are_pulled() -> None:
    teacher, student = on_circle(10.0, 100.0), on_circle(40.0, 90.0).requires_grad_()
    pulls = {"both": torch.tensor([[0.0, -1.0], [0.5, 0.0]]), "one": torch.tensor([[1.0, 0.0], [0.0, 0.0]])}
    pulls["none"] = torch.zeros(2, 2)
    figure = plots.circles(dict.fromkeys(pulls, student), teacher, pulls, columns=2)
    both, one, none, empty = figure.axes
    assert [ax.get_title() for ax in (both, one, none)] == list(pulls)
    assert [len([text for text in ax.texts if getattr(text, "arrow_patch", None)]) for ax in figure.axes] == [
        2,
        1,
        0,
        0,
    ]
    assert not empty.axison
    rings, dots = both.collections
    np.testing.assert_allclose(rings.get_offsets(), teacher)
    np.testing.assert_allclose(dots.get_offsets(), student.detach())
    assert sorted(texts(none.texts)) == ["1", "1", "2", "2"]
    figure.savefig(BytesIO(), format="png")


def test_the_way_of_a_student_is_a_line_that_ends_in_its_dot() -> None:
    way = torch.stack([on_circle(0.0, 90.0), on_circle(5.0, 85.0), on_circle(9.0, 80.0)])
    ax = plots.circles({"way": way}, way[0]).axes[0]
    _, first, second = ax.lines  # behind the circle itself
    np.testing.assert_allclose(first.get_xydata(), way[:, 0])
    np.testing.assert_allclose(second.get_xydata(), way[:, 1])
    np.testing.assert_allclose(ax.collections[1].get_offsets(), way[-1])
    with pytest.raises(ValueError, match=r"one student or more, with pulls for each or none, got \['a'\]"):
        plots.circles({"a": way[0]}, way[0], {})


def test_classes_have_their_points_and_an_arrow_for_each_proxy() -> None:
    points, labels = on_circle(0.0, 90.0, 180.0), torch.tensor([0, 1, 0])
    proxies = {"one": on_circle(3.0, 90.0) * 7, "two": on_circle(0.0, 180.0, 90.0, 91.0)}
    one, two = plots.classes_on_circle(points, labels, proxies, nb_proxy={"two": 2}).axes
    for ax, arrows in ((one, 2), (two, 4)):
        assert [dots.get_label() for dots in ax.collections] == ["class 0", "class 1"]
        np.testing.assert_allclose(ax.collections[0].get_offsets(), points[labels == 0])
        assert len(ax.texts) == arrows
    first, second = (np.linalg.norm(arrow.xy) for arrow in one.texts)
    assert 0.5 < second < first < 1
    assert np.arctan2(*one.texts[0].xy[::-1]) == pytest.approx(np.deg2rad(3.0), abs=1e-5)


def test_accuracies_over_tasks_are_percent_with_a_band_of_the_seeds() -> None:
    seen = {"fine-tuning": torch.tensor([[0.9, 0.5], [0.7, 0.3]]), "frozen": torch.tensor([[0.8, 0.8]])}
    ax = plots.accuracy_over_tasks(seen, classes_a_task=[11, 11]).axes[0]
    np.testing.assert_allclose(ax.lines[0].get_xydata(), [[11, 80], [22, 40]])
    band = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == (pytest.approx(30), pytest.approx(90))
    assert ax.get_xlabel() == "classes learned"
    assert plots.accuracy_over_tasks(seen).axes[0].get_xlabel() == "tasks learned"


def test_accuracies_of_tasks_still_to_come_are_left_empty() -> None:
    matrix = torch.tensor([[0.9, 0.1], [0.456, 0.8]])
    one, other, bar = plots.accuracy_matrices({"one": matrix, "other": matrix / 2}).axes
    assert texts(one.texts) == ["90", "46", "80"]
    assert one.images[0].get_clim() == other.images[0].get_clim() == (0, 100)
    assert (one.get_ylabel(), other.get_ylabel(), bar.get_ylabel()) == ("after task", "", "accuracy, %")
    with pytest.raises(ValueError, match="one matrix or more"):
        plots.accuracy_matrices({})


def test_lines_and_intervals_have_their_names_and_numbers() -> None:
    ax = plots.lines({"a": {1.0: 0.5, 10.0: 0.7}, "b": {1.0: 0.1}}, x_label="x", y_label="y", log_x=True).axes[0]
    assert [line.get_label() for line in ax.lines] == ["a", "b"]
    assert (ax.get_xscale(), ax.get_xlabel(), ax.get_ylabel()) == ("log", "x", "y")
    with pytest.raises(ValueError, match="1 to 5 curves, got 6"):
        plots.lines({str(number): {0.0: 0.0} for number in range(6)}, x_label="", y_label="")

    scores = {"teacher": Interval(value=0.6, low=0.5, high=0.7), "student": Interval(value=0.4, low=0.3, high=0.5)}
    ax = plots.intervals(scores, x_label="nDCG@10").axes[0]
    assert texts(ax.get_yticklabels()) == ["teacher", "student"]
    assert texts(ax.texts) == ["0.600", "0.400"]
    assert ax.yaxis_inverted()


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
