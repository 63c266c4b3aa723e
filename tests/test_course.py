"""The teacher of the notebooks: the one that is named, or a stand-in that says so."""

from pathlib import Path

import pytest
import tiny
import torch

from distill.course import teacher_or_stand_in


def test_the_named_teacher_is_taken(tiny_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = teacher_or_stand_in(str(tiny_bert), tiny.SENTENCES, tmp_path / "none", max_length=20)
    assert (teacher.width, teacher.max_length) == (tiny.WIDTH, 20)
    assert not (tmp_path / "none").exists()
    assert f"width {tiny.WIDTH}" in capsys.readouterr().out


def test_a_stand_in_says_so_and_tells_texts_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    state = torch.get_rng_state()
    teacher = teacher_or_stand_in("no-such-model", tiny.SENTENCES, tmp_path / "stand-in", max_length=32)
    said = capsys.readouterr().out
    assert said.startswith("A random stand-in is used, because of this: ")
    assert "no-such-model" in said
    assert torch.equal(torch.get_rng_state(), state)
    vectors = teacher.encode(tiny.SENTENCES)
    cosines = torch.nn.functional.normalize(vectors) @ torch.nn.functional.normalize(vectors).T
    assert (cosines - torch.eye(len(vectors))).max() < 0.999
