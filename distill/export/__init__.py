"""Hand a student over: a folder that SentenceTransformer(path) opens, with a model card that says what it is.

`python -m distill.export FOLDER` makes more of it: ONNX files, shorter vectors, a repository on the Hub.
"""

from distill.export.card import model_card, usage
from distill.export.provenance import Provenance, this_command
from distill.export.writing import export

__all__ = ["Provenance", "export", "model_card", "this_command", "usage"]
