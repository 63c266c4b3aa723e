"""Another model as the start."""

from pathlib import Path

from distill.encoder import Encoder
from distill.modules import Dense, Normalize
from distill.students.summary import named


def pretrained(name: str | Path | Encoder, teacher: Encoder) -> Encoder:
    """Another model as the start, with a Dense layer to the teacher's width if its own differs: fit that by `fit_projection`.

    Give an Encoder for what its from_pretrained can be asked: a revision, a max_length. Its weights are shared, not copied.
    """
    student = name if isinstance(name, Encoder) else Encoder.from_pretrained(name)
    head = [layer for layer in student.head if isinstance(layer, Dense)]
    if student.full_width != teacher.width:
        head.append(Dense(student.full_width, teacher.width))
    parts = vars(student.parts()) | {"head": [*head, Normalize()]}
    start = Encoder(**parts, compute_dtype=student.compute_dtype, commit=student.commit)
    return named(start, Path(student.name).name, teacher)
