"""The closed-form projection over a stream: as many texts as there are, a few of them at a time, the same result."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import runs
import torch
from torch import Tensor

from distill import students
from distill.encoder import Encoder
from distill.errors import RecipeError
from distill.heads import Projection
from distill.similarity import normalize
from distill.students import projection


@pytest.fixture
def teacher(tiny_bert: Path) -> Encoder:
    return Encoder.from_pretrained(tiny_bert)


def weight(student: Encoder) -> Tensor:
    return projection.last_linear(student).weight.detach().clone()


@pytest.mark.parametrize("ridge", [None, 1e-3])
def test_a_stream_gives_the_closed_form_of_all_rows(
    teacher: Encoder, monkeypatch: pytest.MonkeyPatch, ridge: float | None
) -> None:
    monkeypatch.setattr(projection, "BATCH", 16)
    texts, student = runs.texts(150), students.static(teacher, width=8)
    vectors, asked = teacher.encode(texts), []
    own = student.backbone(student.tokenize(texts).tokens).detach()
    expected = Projection.ridge(normalize(own), vectors, ridge=ridge).weight

    def stored(some: Sequence[str], role: str | None) -> Tensor:
        asked.append((len(some), role))
        return vectors[[texts.index(text) for text in some]]

    students.fit_projection(student, texts, stored, ridge=ridge)
    torch.testing.assert_close(weight(student), expected.detach(), rtol=1e-4, atol=1e-5)
    assert asked == [(16, None)] * 9 + [(6, None)]
    whole = students.static(teacher, width=8)
    students.fit_projection(whole, texts, vectors, ridge=ridge)
    torch.testing.assert_close(weight(whole), weight(student), rtol=0, atol=0)


def test_memory_does_not_grow_with_the_texts(teacher: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor of all rows is ever made: the largest has a batch of rows, or the held-out ones."""
    monkeypatch.setattr(projection, "BATCH", 48)
    monkeypatch.setattr("distill.heads.HELD_OUT_ROWS", 8)
    largest: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):  # type: ignore[no-untyped-def]
            result = function(*arguments, **(options or {}))
            largest.extend(one.shape[0] for one in [result] if isinstance(one, Tensor) and one.ndim == 2)
            return result

    student, texts = students.static(teacher, width=8), runs.texts(400)
    vectors = dict(zip(texts, teacher.encode(texts), strict=True))
    with Watch():
        students.fit_projection(student, texts, lambda some, _: torch.stack([vectors[text] for text in some]))
    assert max(largest) == 48


def test_a_stream_is_read_in_its_roles_and_leaves_out_what_cannot_be_used(
    teacher: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(projection, "BATCH", 16)
    texts, student = runs.texts(90), students.static(teacher, width=8)
    vectors, asked = dict(zip(texts, teacher.encode(texts), strict=True)), []

    def stored(some: Sequence[str], role: str | None) -> Tensor:
        asked.append(role)
        return torch.stack([vectors[text] for text in some])

    good = [text for number, text in enumerate(texts) if number not in (3, 40)]
    students.fit_projection(student, good, stored)
    expected = weight(student)
    vectors[texts[3]], vectors[texts[40]] = torch.full((32,), torch.nan), torch.zeros(32)
    asked.clear()
    students.fit_projection(student, {"query": texts[:20], "document": texts[20:]}, stored)
    torch.testing.assert_close(weight(student), expected, rtol=1e-4, atol=1e-6)
    assert asked == ["query"] * 2 + ["document"] * 5


def test_a_failure_on_the_way_leaves_the_student_as_it_was(teacher: Encoder) -> None:
    student = students.static(teacher, width=8)
    before = student.fingerprint()

    def broken(some: Sequence[str], role: str | None) -> Tensor:
        raise OSError("the store is gone")

    with pytest.raises(OSError, match="the store is gone"):
        students.fit_projection(student, runs.texts(20), broken)
    with pytest.raises(RecipeError, match="got 19 for 20 texts"):
        students.fit_projection(student, runs.texts(20), teacher.encode(runs.texts(19)))
    for width in (1, 31):
        with pytest.raises(RecipeError, match=rf"ends in width 32 and the teacher's vectors have {width}\. .*lead_to"):
            students.fit_projection(student, runs.texts(20), torch.ones(20, width))
    assert student.fingerprint() == before


@pytest.mark.usefixtures("unchecked")
def test_an_array_is_no_tensor(teacher: Encoder) -> None:
    with pytest.raises(TypeError, match="a tensor or a function, got ndarray"):
        students.fit_projection(students.static(teacher, width=8), ["a"], np.ones((1, 32)))  # type: ignore[arg-type]
