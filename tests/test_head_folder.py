"""A CosineLinear in a folder and back, with the names of its classes; folders that are not whole."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from distill.encoder import Encoder
from distill.errors import IntegrityError, RecipeError
from distill.head_folder import load_head, save_head
from distill.heads import CosineLinear

NAMES = ["refund", "Öffnungszeiten", "half a pair \ud83d"]


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({}, torch.float32),
        ({"nb_proxy": 4, "to_reduce": True, "sigma_init": 16.0, "gamma": 10.0}, torch.float32),
        ({"nb_proxy": 2, "sigma": False}, torch.float64),
    ],
)
def test_a_head_that_is_opened_again_is_the_same(tmp_path: Path, options: dict[str, Any], dtype: torch.dtype) -> None:
    head = CosineLinear(8, 2, **options).to(dtype)
    head.add_classes(1)
    save_head(head, tmp_path / "head", names=NAMES)
    before = torch.get_rng_state()
    opened, names = load_head(tmp_path / "head")
    assert torch.equal(torch.get_rng_state(), before)
    assert (names, repr(opened), opened.training) == (NAMES, repr(head), False)
    x = torch.randn(5, 8, dtype=dtype)
    assert torch.equal(opened(x)["logits"], head(x)["logits"])
    opened.add_classes(1)
    assert all(parameter.requires_grad and parameter.dtype == dtype for parameter in opened.parameters())


def test_a_head_takes_the_place_of_an_older_one_and_needs_a_name_for_each_class(tmp_path: Path) -> None:
    save_head(CosineLinear(8, 1), tmp_path / "head", names=["old"])
    save_head(CosineLinear(8, 3), tmp_path / "head", names=NAMES)
    with pytest.raises(ValueError, match="each of 3 classes, got 2"):
        save_head(CosineLinear(8, 3), tmp_path / "head", names=NAMES[:2])
    turned = CosineLinear(8, 3)
    turned.weight = torch.nn.Parameter(torch.randn(8, 3).T)
    save_head(turned, tmp_path / "head", names=NAMES)
    assert load_head(tmp_path / "head")[1] == NAMES
    assert [path.name for path in tmp_path.iterdir()] == ["head"]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("names", ["abc", [0, 1, 2]])
def test_names_that_could_not_be_read_again_are_not_written(tmp_path: Path, names: Any) -> None:
    with pytest.raises(TypeError, match="names are a list of str"):
        save_head(CosineLinear(8, 3), tmp_path / "head", names=names)
    assert not (tmp_path / "head").exists()


def test_a_head_and_a_model_do_not_take_each_others_place(tiny_bert: Path, tmp_path: Path) -> None:
    head, model = CosineLinear(8, 3), Encoder.from_pretrained(tiny_bert)
    save_head(head, tmp_path / "head", names=NAMES)
    model.save_pretrained(tmp_path / "model")
    bare = tmp_path / "bare"  # as transformers saves it: files of the same names
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((tmp_path / "model" / name).read_bytes())
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.json").write_text("{")
    for path in (tmp_path / "model", bare, tmp_path / "damaged"):
        with pytest.raises(RecipeError, match="is not a head's folder"):
            save_head(head, path, names=NAMES)
    with pytest.raises(RecipeError, match="is not a model's folder"):
        model.save_pretrained(tmp_path / "head")
    assert load_head(tmp_path / "head")[1] == NAMES
    for path in (tmp_path / "model", bare):
        with pytest.raises(RecipeError, match="is a model's folder, not a head's"):
            load_head(path)
    (tmp_path / "head" / "notes.txt").write_text("mine")
    with pytest.raises(RecipeError, match="is not a head's folder"):
        save_head(head, tmp_path / "head", names=NAMES)
    Encoder.from_pretrained(tmp_path / "model")
    assert len([*bare.iterdir()]) == 2


@pytest.mark.parametrize("name", [".DS_Store", "Thumbs.db", "desktop.ini"])
def test_what_a_system_puts_into_a_folder_does_not_count(tiny_bert: Path, tmp_path: Path, name: str) -> None:
    for folder in ("head", "model"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_bytes(b"x")
    save_head(CosineLinear(8, 3), tmp_path / "head", names=NAMES)
    (tmp_path / "head" / name).write_bytes(b"x")
    save_head(CosineLinear(8, 3), tmp_path / "head", names=NAMES)
    Encoder.from_pretrained(tiny_bert).save_pretrained(tmp_path / "model")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / ".env").write_bytes(b"x")
    with pytest.raises(RecipeError, match="is there already"):
        save_head(CosineLinear(8, 3), tmp_path / "other", names=NAMES)


def changed(**settings: Any) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "do not belong together"),
        (lambda folder: (folder / "config.json").write_text("{"), "is not JSON"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"no weights"), "is damaged"),
        (lambda folder: save_file({"weight": torch.ones(3, 8)}, folder / "model.safetensors"), "sigma"),
        (changed(in_features=9), "size mismatch"),
        (changed(out_features=10**12, names=[]), "size mismatch"),
        (changed(nb_proxy=0), "sizes of at least 1"),
        (changed(nb_proxy="1"), "do not belong together"),
        (changed(bias=True), "bias"),
        (changed(names=NAMES[:2]), "names are those of 3 classes"),
        (changed(names=[1, 2, 3]), "names are those of 3 classes"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_a_folder_that_is_not_whole_is_refused(tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    save_head(CosineLinear(8, 3), tmp_path / "head", names=NAMES)
    damage(tmp_path / "head")
    with pytest.raises(IntegrityError, match=message):
        load_head(tmp_path / "head")
