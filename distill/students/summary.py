"""What a student is called, and how large it is."""

from pathlib import Path

from distill.encoder import Encoder


def describe(student: Encoder) -> str:
    count = student.parameter_count
    return f"{student.name}: {count / 1e6:.1f}M parameters, {4 * count / 1e6:.0f} MB, width {student.width}"


def named(student: Encoder, kind: str, teacher: Encoder) -> Encoder:
    student.name = f"{Path(teacher.name).name}-{kind}"
    return student.eval()
