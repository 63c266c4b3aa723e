"""How good a student is: fidelity to its teacher without labels, and STS, retrieval and classification with them.

Every number comes with its bootstrap 95 % interval. Teacher vectors are read from the store, and embedded into it once.
"""

from distill.evaluation.fidelity import fidelity, fidelity_slices
from distill.evaluation.scores import Score, Scores, Slice, differences_json, slice_table
from distill.evaluation.systems import EvaluationData, encode_everywhere, evaluate
from distill.evaluation.tasks import centroid_accuracy, mixed_index, retrieval, similarity_pairs

__all__ = [
    "EvaluationData",
    "Score",
    "Scores",
    "Slice",
    "centroid_accuracy",
    "differences_json",
    "encode_everywhere",
    "evaluate",
    "fidelity",
    "fidelity_slices",
    "mixed_index",
    "retrieval",
    "similarity_pairs",
    "slice_table",
]
