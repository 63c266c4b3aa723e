"""Ways to make a student. Each returns an Encoder that emits vectors in the teacher's space, ready to train."""

from distill.students.from_model import pretrained
from distill.students.layers import freeze_token_table, keep_layers
from distill.students.projection import fit_projection
from distill.students.summary import describe
from distill.students.token_table import static

__all__ = ["describe", "fit_projection", "freeze_token_table", "keep_layers", "pretrained", "static"]
