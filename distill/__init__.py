"""Turn a slow, good embedding model into a small, fast one that lives in the same vector space, so that the index stays.

In the order of the data: `data` and `docstrings` read texts, `Encoder` is a model, `embed` fills the `Store` of teacher
vectors, `students` makes a student, `losses` compare it with the teacher, `train` trains it, `evaluate` measures it,
`export` hands it over.

Axes, in annotations and patterns: b pairs here · g pairs over all processes · n bank rows · q queries · k candidates ·
t tokens · d student width · e teacher width · c classes · p proxies.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_NAMES = {
    "cosine_similarity_matrix": "similarity",
    "CosineLinear": "heads",
    "Projection": "heads",
    "Encoder": "encoder",
    "load_texts": "data",
    "Store": "store",
    "TrainConfig": "training",
    "train": "training",
    "evaluate": "evaluation",
    "EvaluationData": "evaluation",
}
_MODULES = ("losses", "similarity", "heads", "metrics", "students", "data", "docstrings", "embed", "export", "hub")

__all__ = [*_NAMES, *_MODULES]


def __getattr__(name: str) -> Any:
    """Import on first use: the losses alone need neither transformers nor datasets."""
    if name in _NAMES:
        return getattr(importlib.import_module(f"distill.{_NAMES[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"distill.{name}")
    raise AttributeError(f"module 'distill' has no attribute {name!r}")
