"""Losses: `loss(student, teacher, *, options) -> scalar`, each a function and a thin Module of the same words.

The student comes first, the teacher is detached inside, rows need not be unit length. `bank` holds further teacher
vectors for the columns of a cross loss.
"""

from distill.losses.combine import Matryoshka, Schedule, WeightedSum, constant, linear_decay
from distill.losses.cross import CrossContrastive, CrossKL, CrossMSE, cross_contrastive, cross_kl, cross_mse
from distill.losses.pairs import RankHinge, RKDAngle, RKDDistance, rank_hinge, rkd_angle, rkd_distance
from distill.losses.pointwise import CosineDistance, EmbeddingMSE, cosine_distance, embedding_mse
from distill.losses.relational import (
    CKA,
    GramKL,
    GramMSE,
    SimilarityPreserving,
    cka,
    gram_kl,
    gram_mse,
    similarity_preserving,
)
from distill.losses.scores import MarginMSE, ScoreKL, margin_mse, score_kl
from distill.losses.temperature import calibrate_temperature

__all__ = [
    "CKA",
    "CosineDistance",
    "CrossContrastive",
    "CrossKL",
    "CrossMSE",
    "EmbeddingMSE",
    "GramKL",
    "GramMSE",
    "MarginMSE",
    "Matryoshka",
    "RKDAngle",
    "RKDDistance",
    "RankHinge",
    "Schedule",
    "ScoreKL",
    "SimilarityPreserving",
    "WeightedSum",
    "calibrate_temperature",
    "cka",
    "constant",
    "cosine_distance",
    "cross_contrastive",
    "cross_kl",
    "cross_mse",
    "embedding_mse",
    "gram_kl",
    "gram_mse",
    "linear_decay",
    "margin_mse",
    "rank_hinge",
    "rkd_angle",
    "rkd_distance",
    "score_kl",
    "similarity_preserving",
]
