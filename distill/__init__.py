"""Turn a slow, good embedding model into a small, fast one that lives in the same vector space, so that the index stays.

In the order of the data: `data` and `docstrings` read texts, `Encoder` is a model, `embed` fills the `Store` of teacher
vectors, `students` makes a student, `losses` compare it with the teacher, `train` trains it, `evaluate` measures it,
`export` hands it over.

Axes, in annotations and patterns: b pairs here · g pairs over all processes · n bank rows · q queries · k candidates ·
t tokens · d student width · e teacher width · c classes · p proxies.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distill import data, docstrings, embed, export, heads, hub, losses, metrics, similarity, students
    from distill.data import load_texts
    from distill.encoder import Encoder
    from distill.evaluation import EvaluationData, evaluate
    from distill.heads import CosineLinear, Projection
    from distill.similarity import cosine_similarity_matrix
    from distill.store import Store
    from distill.training import TrainConfig, train

__version__ = "0.1.0"

__all__ = [
    "CosineLinear",
    "Encoder",
    "EvaluationData",
    "Projection",
    "Store",
    "TrainConfig",
    "cosine_similarity_matrix",
    "data",
    "docstrings",
    "embed",
    "evaluate",
    "export",
    "heads",
    "hub",
    "load_texts",
    "losses",
    "metrics",
    "similarity",
    "students",
    "train",
]
# Where a name stands; the others are modules.
_HOMES = {
    "CosineLinear": "heads",
    "Encoder": "encoder",
    "EvaluationData": "evaluation",
    "Projection": "heads",
    "Store": "store",
    "TrainConfig": "training",
    "cosine_similarity_matrix": "similarity",
    "evaluate": "evaluation",
    "load_texts": "data",
    "train": "training",
}

if not TYPE_CHECKING:  # a type checker would take any name for one that this finds

    def __getattr__(name: str) -> Any:
        """Import on first use: the losses alone need neither transformers nor datasets."""
        if name in _HOMES:
            return getattr(importlib.import_module(f"distill.{_HOMES[name]}"), name)
        if name in __all__:
            return importlib.import_module(f"distill.{name}")
        raise AttributeError(f"module 'distill' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
