"""Several teachers, one target: their stores, of any widths and tokenizers, joined text by text into a store to train on.

    stores = [embed(texts, one, path) for one, path in zip(teachers, paths, strict=True)]
    keys = [keys_by_role(texts, one) for one in teachers]  # each teacher's own prompts are in its keys
    target = procrustes_mean(stores, keys=keys, weights=(2.0, 1.0)).store
    examples = match(texts, student, teachers[0], target)
    run = train(student, examples, target, CosineDistance(), TrainConfig(epochs=10.0), output=output)

`several` does the same from the texts themselves, and joins vectors of further texts, to be measured on; the command
`distill.teachers` joins stores that are there.

procrustes_mean: in the first teacher's space, so that its index stays. concatenate: every cosine is the weighted mean of
the teachers', at the width of all of them; nearly so, at a width of your choice. That is a space of its own.
Any number of rows: two passes over the stores (one if the joined store stands: its matrix is found again), O((sum of widths)^2) memory. All rows that are written have length 1.
"""

from distill.joining.methods import Method, concatenate, join_stores, keys_by_role, procrustes_mean
from distill.joining.several import Several, several
from distill.joining.stores import Joined

__all__ = [
    "Joined",
    "Method",
    "Several",
    "concatenate",
    "join_stores",
    "keys_by_role",
    "procrustes_mean",
    "several",
]
