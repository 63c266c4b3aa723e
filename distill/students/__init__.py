"""Ways to make a student. Each returns an Encoder that emits vectors in the teacher's space, ready to train."""

from distill.students.choosing import choose_layers
from distill.students.from_model import pretrained
from distill.students.layers import freeze_token_table, keep_layers, layer_numbers
from distill.students.projection import fit_projection, lead_to
from distill.students.pruning import prune, require_units
from distill.students.quantizing import TableCost, quantize
from distill.students.summary import describe
from distill.students.tiny import require_sizes, tiny
from distill.students.token_table import require_width, static
from distill.students.vocabulary import Vocabulary, fit_vocabulary

__all__ = [
    "TableCost",
    "Vocabulary",
    "choose_layers",
    "describe",
    "fit_projection",
    "fit_vocabulary",
    "freeze_token_table",
    "keep_layers",
    "layer_numbers",
    "lead_to",
    "pretrained",
    "prune",
    "quantize",
    "require_sizes",
    "require_units",
    "require_width",
    "static",
    "tiny",
]
