"""Numbers that say how good a model is: exact over uneven batches and processes, with intervals."""

from distill.metrics.classes import AccuracyCounts, accuracy, accuracy_counts
from distill.metrics.incremental import average_incremental_accuracy, forgetting, seen_accuracy
from distill.metrics.intervals import (
    Difference,
    Interval,
    bootstrap_interval,
    bootstrap_means,
    mean,
    paired_difference,
    resampled_difference,
)
from distill.metrics.ranks import QueryScores, ndcg_at_k, recall_at_k, spearman, spearman_counted
from distill.metrics.spaces import (
    effective_rank,
    effective_rank_rows,
    index_overlap,
    linear_cka,
    linear_cka_rows,
    neighbour_margin,
    neighbour_overlap,
    shared,
)

__all__ = [
    "AccuracyCounts",
    "Difference",
    "Interval",
    "QueryScores",
    "accuracy",
    "accuracy_counts",
    "average_incremental_accuracy",
    "bootstrap_interval",
    "bootstrap_means",
    "effective_rank",
    "effective_rank_rows",
    "forgetting",
    "index_overlap",
    "linear_cka",
    "linear_cka_rows",
    "mean",
    "ndcg_at_k",
    "neighbour_margin",
    "neighbour_overlap",
    "paired_difference",
    "recall_at_k",
    "resampled_difference",
    "seen_accuracy",
    "shared",
    "spearman",
    "spearman_counted",
]
