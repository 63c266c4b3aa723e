"""Numbers that say how good a model is: exact over uneven batches and processes, with intervals."""

from distill.metrics.classes import AccuracyCounts, accuracy, accuracy_counts
from distill.metrics.intervals import Interval, bootstrap_interval, mean
from distill.metrics.ranks import QueryScores, ndcg_at_k, recall_at_k, spearman
from distill.metrics.spaces import effective_rank, neighbour_overlap

__all__ = [
    "AccuracyCounts",
    "Interval",
    "QueryScores",
    "accuracy",
    "accuracy_counts",
    "bootstrap_interval",
    "effective_rank",
    "mean",
    "ndcg_at_k",
    "neighbour_overlap",
    "recall_at_k",
    "spearman",
]
