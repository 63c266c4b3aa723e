"""One file that gives the vector: ONNX Runtime beside the PyTorch student, batch and length free, its errors measured."""

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from distill import students
from distill.encoder import Encoder
from distill.errors import NumericsError, RecipeError
from distill.export import onnx
from distill.export.__main__ import main
from distill.export.onnx import FLOAT, INT8, Measured, export_onnx

runtime = pytest.mark.skipif(
    bool(onnx.absent()),
    reason="the extra onnx is not installed",
)
TEXTS = [*tiny.SENTENCES, "", "word " * 200, "MIXED Case, and an unknown: ŵ", "a"]


@pytest.fixture(scope="module")
def exported(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple]:
    """Student, folder, and what was measured; each exported once."""
    made: dict[str, tuple[Encoder, Path, list[Measured]]] = {}

    def export(kind: str) -> tuple[Encoder, Path, list[Measured]]:
        if kind not in made:
            teacher = Encoder.from_pretrained(tiny_model("bert", layers=1))
            student = students.static(teacher, width=8) if kind == "static" else teacher
            folder = tmp_path_factory.mktemp("onnx") / "student"
            student.save_pretrained(folder)
            student = Encoder.from_pretrained(folder)
            made[kind] = student, folder, export_onnx(student, folder, TEXTS, int8=True)
        return made[kind]

    return export


@runtime
@pytest.mark.parametrize("kind", ["static", "bert"])
def test_onnx_runtime_gives_the_students_vectors(exported: Any, kind: str) -> None:
    student, folder, _ = exported(kind)
    expected = student.encode(TEXTS)
    assert (onnx.run(folder / "onnx" / FLOAT, TEXTS) - expected).abs().max() <= 1e-5
    assert (onnx.run(folder / "onnx" / FLOAT, TEXTS[:1]) - expected[:1]).abs().max() <= 1e-5


@runtime
@pytest.mark.parametrize("kind", ["static", "bert"])
@pytest.mark.parametrize("file", [FLOAT, INT8])
def test_a_vector_does_not_depend_on_the_texts_beside_it(exported: Any, kind: str, file: str) -> None:
    path = exported(kind)[1] / "onnx" / file
    together = onnx.run(path, TEXTS)
    alone = torch.cat([onnx.run(path, [text]) for text in TEXTS])
    # In int8 what comes into a transformer's product has one scale a batch: neighbours matter, within the error.
    exact = file == FLOAT or kind == "static"
    assert (together - alone).abs().max() <= (1e-5 if exact else 0.1)


@runtime
@pytest.mark.parametrize("kind", ["static", "bert"])
def test_what_a_file_loses_is_measured_and_kept(exported: Any, kind: str) -> None:
    student, folder, measured = exported(kind)
    assert [one.file for one in measured] == [FLOAT, INT8]
    assert json.loads((folder / "onnx" / "measured.json").read_text()) == {one.file: asdict(one) for one in measured}
    assert onnx.measured(folder) == measured
    whole, small = measured
    assert whole.largest_difference <= 1e-5
    expected = (onnx.run(folder / "onnx" / INT8, TEXTS) - student.encode(TEXTS)).abs().max()
    assert small.largest_difference == pytest.approx(float(expected), rel=1e-4)
    assert 1e-5 < small.largest_difference < 0.2, "int8 that loses nothing is no int8"
    assert small.mean_cosine > 0.98
    assert small.bytes == os.path.getsize(folder / "onnx" / INT8)


@runtime
@pytest.mark.parametrize("kind", ["static", "bert"])
def test_int8_weights_take_a_byte(exported: Any, kind: str) -> None:
    import onnx as files

    def weights(name: str) -> dict[str, int]:
        graph = files.load(exported(kind)[1] / "onnx" / name).graph
        arrays = [files.numpy_helper.to_array(one) for one in graph.initializer]
        return {size: sum(a.size for a in arrays if a.ndim == 2 and a.itemsize == size) for size in (1, 4)}

    whole, small = weights(FLOAT), weights(INT8)
    assert whole[1] == 0
    assert small[1] > 2 * small[4], (
        "tables and matrices are int8; positions stay, and so does a Dense layer as small as this"
    )


@runtime
def test_a_file_tells_nothing_of_the_machine_that_wrote_it(exported: Any) -> None:
    for kind, name in (("static", FLOAT), ("bert", FLOAT), ("bert", INT8)):
        content = (exported(kind)[1] / "onnx" / name).read_bytes()
        assert str(Path(onnx.__file__).parent.parent).encode() not in content
        assert b"site-packages" not in content


@runtime
def test_the_lines_on_the_card_run(exported: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    student, folder, _ = exported("bert")
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    exec(compile(onnx.usage(), "usage", "exec"), names)
    texts = ["a query for the index you already have", "another one"]
    assert (torch.from_numpy(names["vectors"]) - student.encode(texts)).abs().max() <= 1e-5


@runtime
def test_a_student_that_differs_is_not_written(exported: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx, "LARGEST_DIFFERENCE", 0.0)
    with pytest.raises(NumericsError, match="nothing was written"):
        export_onnx(exported("static")[0], tmp_path, TEXTS)
    assert not [*tmp_path.iterdir()]


@runtime
def test_sums_of_whole_numbers_do_not_saturate(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """Large weights of one sign under large activations of one sign: the worst case of a processor without VNNI."""
    student = Encoder.from_pretrained(tiny_model("bert", layers=1))
    layer = student.backbone.model.encoder.layer[0]
    with torch.no_grad():
        layer.intermediate.dense.bias.fill_(4.0)  # gelu lets it through
        layer.output.dense.weight.abs_().clamp_(min=0.2)
    _, small = export_onnx(student, tmp_path, tiny.SENTENCES, int8=True)
    assert small.mean_cosine > 0.99


@runtime
def test_int8_that_is_another_model_is_not_written(
    exported: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx, "LEAST_COSINE", 1.1)
    with pytest.raises(NumericsError, match="Leave out --int8"):
        export_onnx(exported("static")[0], tmp_path, TEXTS, int8=True)
    assert not [*tmp_path.iterdir()]


@runtime
def test_the_command_writes_files_and_a_section_of_the_card(exported: Any, tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "student"
    exported("static")[0].save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n\n# s\n\n## How it was made\n\n- by hand\n")
    (tmp_path / "texts.txt").write_text("\n".join(tiny.SENTENCES))
    arguments = [str(folder), "--onnx", "--int8", "--truncate-dim", "5", "--texts", str(tmp_path / "texts.txt")]
    assert main(arguments) == 0
    assert onnx.run(folder / "onnx" / FLOAT, TEXTS[:3]).shape == (3, 5)
    card = (folder / "README.md").read_text()
    assert card.index("## Width") < card.index("## ONNX") < card.index("## How it was made")
    assert main([str(folder), "--truncate-dim", "6"]) == 2  # the file gives vectors of 5 numbers
    assert f"onnx/{INT8}: " in card.replace("`", "")
    assert "first 5 of 32 numbers" in card
    assert f"{INT8}: " in capsys.readouterr().out


@runtime
def test_prompts_stand_in_a_paragraph_of_their_own(exported: Any, tmp_path: Path) -> None:
    folder = tmp_path / "student"
    exported("static")[0].save_pretrained(folder)
    student = Encoder.from_pretrained(folder)
    student.prompts["query"] = "find: "
    student.save_pretrained(folder)
    (tmp_path / "texts.txt").write_text("\n".join(tiny.SENTENCES))
    assert main([str(folder), "--onnx", "--texts", str(tmp_path / "texts.txt")]) == 0
    card = (folder / "README.md").read_text()
    assert '```\n\nPut the prompt of its role before a text: {"query": "find: "}.\n\nMeasured beside' in card


@runtime
def test_a_command_that_fails_leaves_the_folder_as_it_was(
    exported: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    folder, texts = tmp_path / "student", tmp_path / "texts.txt"
    exported("static")[0].save_pretrained(folder)

    def content() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    before, arguments = content(), [str(folder), "--onnx", "--truncate-dim", "5", "--texts", str(texts)]
    assert main(arguments) == 3
    assert "texts.txt" in capsys.readouterr().err
    assert content() == before
    texts.write_text("\n".join(tiny.SENTENCES))
    with monkeypatch.context() as patched:
        patched.setattr(onnx, "LARGEST_DIFFERENCE", -1.0)
        assert main(arguments) == 5
    assert content() == before
    assert main(arguments) == 0
    assert Encoder.from_pretrained(folder).width == 5
    assert main([*arguments[:3], "32", *arguments[4:]]) == 0
    assert Encoder.from_pretrained(folder).width == onnx.run(folder / "onnx" / FLOAT, TEXTS[:3]).shape[1] == 32


def test_the_extra_is_named_where_it_is_missing(tiny_bert: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(onnx.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r'pip install "distill\[onnx\]"'):
        export_onnx(Encoder.from_pretrained(tiny_bert), tiny_bert, TEXTS)
    assert main([str(tiny_bert), "--onnx"]) == 2
    assert "distill[onnx]" in capsys.readouterr().err


@pytest.mark.slow
@runtime
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("mpnet", {}),
        ("bert_cls_dense", {}),
        ("distilbert", {}),
        ("albert", {}),
        ("qwen", {}),
        ("qwen", {"padding_side": "left"}),
        ("bert", {"layers": 1, "pooling": ["weightedmean", "max"], "head": []}),
        ("bert", {"layers": 1, "lowercase": False, "do_lower_case": True}),
    ],
    ids=str,
)
def test_every_architecture(tiny_model: Callable[..., Path], tmp_path: Path, kind: str, options: dict) -> None:
    student = Encoder.from_pretrained(tiny_model(kind, **options))
    texts = [text for text in TEXTS if text or kind != "qwen"]
    whole, small = export_onnx(student, tmp_path, texts, int8=True)
    assert whole.largest_difference <= 1e-5
    assert small.mean_cosine > 0.9
    together = onnx.run(tmp_path / "onnx" / FLOAT, texts)
    assert (together - torch.cat([onnx.run(tmp_path / "onnx" / FLOAT, [text]) for text in texts])).abs().max() <= 1e-5
