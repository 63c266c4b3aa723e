"""How good a student is: fidelity to its teacher without labels, and STS, retrieval and classification with them.

Every number comes with its bootstrap 95 % interval. Teacher vectors are read from the store, and embedded into it once.
"""

from distill.evaluation.closeup import Case, Closeup, Neighbour, closeup, closeup_json
from distill.evaluation.fidelity import fidelity, fidelity_slices
from distill.evaluation.precisions import Precision, quantize, restore
from distill.evaluation.scores import (
    INDEX,
    MIXED,
    START,
    STUDENT,
    Score,
    Scores,
    Slice,
    Stored,
    differences_json,
    retention_json,
    slice_table,
)
from distill.evaluation.systems import EvaluationData, encode_everywhere, evaluate, task_scores
from distill.evaluation.tasks import centroid_accuracy, mixed_index, retrieval, similarity_pairs

__all__ = [
    "INDEX",
    "MIXED",
    "START",
    "STUDENT",
    "Case",
    "Closeup",
    "EvaluationData",
    "Neighbour",
    "Precision",
    "Score",
    "Scores",
    "Slice",
    "Stored",
    "centroid_accuracy",
    "closeup",
    "closeup_json",
    "differences_json",
    "encode_everywhere",
    "evaluate",
    "fidelity",
    "fidelity_slices",
    "mixed_index",
    "quantize",
    "restore",
    "retention_json",
    "retrieval",
    "similarity_pairs",
    "slice_table",
    "task_scores",
]
