"""The temperature of a run: that of its training vectors, found once and kept in its folder."""

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import runs
import torch

from distill.errors import RecipeError
from distill.losses import calibrate_temperature
from distill.store import Store, compress
from distill.training import Examples, calibration, sampling
from distill.training.calibration import Calibration, calibrate


@pytest.fixture(scope="module")
def prepared(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Examples, Store]:
    _, data, store = runs.prepared(tiny_bert, tmp_path_factory.mktemp("calibration") / "store", 50, "static")
    return data, store


def found(prepared: tuple[Examples, Store], output: Path, **options: Any) -> Calibration:
    chosen: dict[str, Any] = {"perplexity": 8.0, "columns": 40, "seed": 3} | options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return calibrate(*prepared, output=output, **chosen)


def test_it_is_the_temperature_of_as_many_training_vectors_as_a_step_has(
    prepared: tuple[Examples, Store], tmp_path: Path
) -> None:
    data, store = prepared
    calibrated = found(prepared, tmp_path)
    chosen = sampling.permutation(3, 0, 50)[:40]
    vectors, keys = store.take(data.rows[chosen]), data.keys[torch.from_numpy(chosen)]
    assert calibrated.temperature == calibrate_temperature(vectors, perplexity=8.0, keys=keys)
    assert (calibrated.columns, calibrated.perplexity) == (40, 8)
    assert str(calibrated).startswith(f"temperature {calibrated.temperature:.4g}: there")
    assert found(prepared, tmp_path / "all", columns=10**6).columns == 50


def test_a_text_of_the_same_key_is_no_column_of_its_row(prepared: tuple[Examples, Store], tmp_path: Path) -> None:
    data, store = prepared
    first = found(prepared, tmp_path, columns=50)
    twins = data.keys.clone()
    twins[25:] = twins[:25]
    again = found((replace(data, keys=twins), store), tmp_path, columns=50)
    chosen = sampling.permutation(3, 0, 50)
    expected = calibrate_temperature(
        store.take(data.rows[chosen]), perplexity=8.0, keys=twins[torch.from_numpy(chosen)]
    )
    assert again.temperature == expected != first.temperature


def test_a_run_that_goes_on_reads_it_back_to_the_last_digit(
    prepared: tuple[Examples, Store], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = found(prepared, tmp_path)
    monkeypatch.setattr(calibration, "calibrate_temperature", lambda *_, **__: pytest.fail("computed again"))
    assert found(prepared, tmp_path) == first


def test_other_vectors_of_the_same_teacher_have_their_own(prepared: tuple[Examples, Store], tmp_path: Path) -> None:
    data, store = prepared
    smaller = compress(store.path, tmp_path / "smaller", "int8")
    first = found(prepared, tmp_path / "run")
    again = found((replace(data, rows=smaller.find(store.keys[data.rows])), smaller), tmp_path / "run")
    assert again.teacher != first.teacher
    assert again.temperature != first.temperature


@pytest.mark.parametrize("other", [{"perplexity": 9.0}, {"columns": 39}, {"seed": 4}])
def test_what_was_found_for_something_else_is_found_anew(
    prepared: tuple[Examples, Store], tmp_path: Path, other: dict[str, Any]
) -> None:
    first = found(prepared, tmp_path)
    again = found(prepared, tmp_path, **other)
    assert again.temperature != first.temperature
    assert again.temperature == json.loads((tmp_path / "temperature.json").read_text())["temperature"]


@pytest.mark.parametrize("damage", ["", "[1]", '{"temperature": 0.1', "{}"])
def test_a_damaged_file_is_written_anew(prepared: tuple[Examples, Store], tmp_path: Path, damage: str) -> None:
    first = found(prepared, tmp_path)
    (tmp_path / "temperature.json").write_text(damage)
    assert found(prepared, tmp_path) == first


def test_a_perplexity_above_the_columns_is_an_error_of_the_recipe(
    prepared: tuple[Examples, Store], tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=r"the texts to train on give no temperature: .*here 39; got 60"):
        found(prepared, tmp_path, perplexity=60.0)
