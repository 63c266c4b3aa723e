"""How good a student is: fidelity to its teacher without labels, and STS, retrieval and classification with them.

Every number comes with its bootstrap 95 % interval. Teacher vectors are read from the store, and embedded into it once.
"""

from distill.evaluation.fidelity import fidelity
from distill.evaluation.scores import Score, Scores
from distill.evaluation.systems import EvaluationData, encode_everywhere, evaluate
from distill.evaluation.tasks import centroid_accuracy, retrieval, similarity_pairs

__all__ = [
    "EvaluationData",
    "Score",
    "Scores",
    "centroid_accuracy",
    "encode_everywhere",
    "evaluate",
    "fidelity",
    "retrieval",
    "similarity_pairs",
]
