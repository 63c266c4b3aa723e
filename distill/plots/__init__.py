"""Figures for notebooks: each function returns a matplotlib Figure and shows nothing; matplotlib is imported when one is drawn."""

from distill.plots.circles import circles, classes_on_circle
from distill.plots.curves import accuracy_over_tasks, cost_curve, intervals, lines, loss_curve
from distill.plots.matrices import LIGHT_TO_DARK, accuracy_matrices, similarity_heatmap, similarity_heatmaps

__all__ = [
    "LIGHT_TO_DARK",
    "accuracy_matrices",
    "accuracy_over_tasks",
    "circles",
    "classes_on_circle",
    "cost_curve",
    "intervals",
    "lines",
    "loss_curve",
    "similarity_heatmap",
    "similarity_heatmaps",
]
