"""Compressed rows come back as near as the store says they do, bit for bit the same whoever wrote them."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from distill import files
from distill.errors import DataError, DistillError, IntegrityError, RecipeError, ResourceError
from distill.store import (
    GOOD,
    NO_TOKENS,
    NOT_FINITE,
    ZERO,
    Rows,
    Store,
    compress,
    compression,
    text_keys,
    verify,
    write_store,
)
from distill.store.__main__ import main
from distill.store.compression import Distortion, Format, fit, measure, spread

FINGERPRINT: dict[str, Any] = {"weights": "ab" * 32, "max_length": 64}
WIDTH = 24
FORMATS = ["int8", "pca-8", "pca-8-int8"]
few = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def vectors(count: int = 200, width: int = WIDTH, seed: int = 0) -> np.ndarray:
    """Unit rows as teachers have them: columns of very different spread, one far from zero."""
    draw = np.random.default_rng(seed)
    rows = draw.normal(size=(count, width)) * np.geomspace(1, 0.05, width) + np.eye(width)[3]
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def rows(given: np.ndarray, flags: int | np.ndarray = GOOD, prefix: str = "text") -> Rows:
    keys = text_keys([f"{prefix} {i}" for i in range(len(given))])
    return Rows(given, keys, np.arange(len(given)), np.full(len(given), flags) if isinstance(flags, int) else flags)


def cosines(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    one, other = one.astype(np.float64), other.astype(np.float64)
    return (one * other).sum(1) / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1)


def make(path: Path, form: str, given: np.ndarray) -> Store:
    """A store of this format, written in two shards."""
    codec = fit(Format.parse(form), given)
    made = Store.open_or_create(path, FINGERPRINT, given.shape[1], codec=codec)
    half = len(given) // 2
    for part in (slice(0, half), slice(half, None)):
        made.publish(made.append(Rows(*(column[part] for column in vars(rows(given)).values()))))
    return made


@pytest.fixture(params=FORMATS)
def form(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def small(form: str, tmp_path: Path) -> Store:
    return make(tmp_path / "store", form, vectors())


def change(damaged: Store, edit: Callable[[dict[str, Any]], object]) -> None:
    path = damaged.path / "manifest.json"
    manifest = json.loads(path.read_text())
    edit(manifest)
    path.write_text(json.dumps(manifest))


# Formats


@pytest.mark.parametrize("name", ["float16", "int8", "pca-8", "pca-8-int8", "pca-256", "pca-1"])
def test_a_format_is_what_its_name_says(name: str) -> None:
    assert str(Format.parse(name)) == name
    assert Format.parse(name).compressed == (name != "float16")
    assert Format.parse("pca-8-float16") == Format.parse("pca-8") == Format("float16", 8)


@pytest.mark.parametrize(
    "name",
    ["", "fp16", "int4", "pca", "pca-", "pca-0", "pca--8", "pca-8-", "pca-8int8", "-int8", "8", "INT8", "pca-08"],
)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(RecipeError, match="float16, int8, pca-K or pca-K-int8"):
        Format.parse(name)


def test_bytes_and_columns_of_a_row() -> None:
    found = {name: (Format.parse(name).columns(768), Format.parse(name).row_bytes(768)) for name in ("float16", "int8")}
    assert found == {"float16": (768, 1536), "int8": (768, 768)}
    assert [Format.parse(name).row_bytes(768) for name in ("pca-256", "pca-256-int8")] == [512, 256]
    with pytest.raises(RecipeError, match=r"fewer than 8 is what it is for\. Use int8"):
        Format.parse("pca-8-int8").columns(8)


# Codecs


def test_int8_is_off_by_half_a_step_of_each_column_at_most() -> None:
    given = vectors(500)
    codec = fit(Format("int8"), given)
    back = codec.decode(codec.encode(given).astype(np.float32))
    assert codec.encode(given).dtype == np.int8
    assert (np.abs(back - given) <= codec.scale / 2 * 1.001).all()


def test_a_scale_of_each_column_beats_one_of_all() -> None:
    given = (0.05 * np.random.default_rng(0).normal(size=(500, WIDTH)) + np.eye(WIDTH)[3]).astype(np.float32)
    codec, step = fit(Format("int8"), given), np.abs(given).max() / 127
    back = codec.decode(codec.encode(given).astype(np.float32))
    assert (1 - cosines(back, given)).mean() < (1 - cosines(np.rint(given / step) * step, given)).mean() / 4


def test_a_value_beyond_the_range_is_its_end() -> None:
    codec = fit(Format("int8"), vectors(500))
    assert np.abs(codec.encode(1e3 * vectors(5)).astype(int)).max() == 127


def test_a_few_rows_give_a_range_that_others_fit_in() -> None:
    given = vectors(2000)
    codec = fit(Format("int8"), given[:32])
    clipped = np.abs(codec.encode(given[32:]).astype(int)) == 127
    assert clipped.mean() < 1e-3
    absmax = np.abs(given[:32] - given[:32].mean(0)).max(0)
    assert (np.abs(given[32:] - given[:32].mean(0)) > absmax).mean() > 10 * clipped.mean()


def test_pca_keeps_the_directions_that_a_dense_decomposition_names() -> None:
    given = vectors(300)
    codec = fit(Format("float16", 8), given)
    assert codec.rotation is not None
    directions = np.linalg.svd(given.astype(np.float64))[2][:8]
    np.testing.assert_allclose(codec.rotation.T @ codec.rotation, directions.T @ directions, atol=1e-6)
    np.testing.assert_allclose(codec.rotation @ codec.rotation.T, np.eye(8), atol=1e-6)


def test_pca_loses_nothing_of_rows_that_have_so_many_directions() -> None:
    draw = np.random.default_rng(1)
    given = (draw.normal(size=(100, 8)) @ draw.normal(size=(8, WIDTH))).astype(np.float32)
    codec = fit(Format("float16", 8), given)
    back = codec.decode(codec.encode(given).astype(np.float32))
    np.testing.assert_allclose(back, given, rtol=2e-3, atol=2e-2)
    assert (1 - cosines(back, given)).max() < 1e-6
    fewer = fit(Format("float16", 7), given)
    assert (1 - cosines(fewer.decode(fewer.encode(given).astype(np.float32)), given)).max() > 1e-3


@pytest.mark.parametrize("length", [1.0, 7.5])
def test_pca_keeps_the_length_of_a_row(length: float) -> None:
    given = length * vectors(300)
    codec = fit(Format("float16", 8), given)
    back = codec.decode(codec.encode(given).astype(np.float32))
    np.testing.assert_allclose(np.linalg.norm(back, axis=1), np.linalg.norm(given, axis=1), rtol=1e-3)


@pytest.mark.parametrize("form", ["float16", *FORMATS])
def test_the_bits_of_a_row_do_not_depend_on_the_rows_beside_it(form: str) -> None:
    given = vectors(130)
    codec = fit(Format.parse(form), given)
    whole = codec.encode(given)
    assert (np.concatenate([codec.encode(given[i : i + 1]) for i in range(130)]) == whole).all()
    assert (codec.encode(given[::-1])[::-1] == whole).all()


def test_rows_that_are_not_finite_become_zeros_beside_others_that_stay(form: str) -> None:
    given = vectors(50)
    codec = fit(Format.parse(form), given)
    expected, given = codec.encode(given), given.copy()
    given[7, 2], given[9, 0] = np.nan, np.inf
    others = np.delete(np.arange(50), [7, 9])
    found = codec.encode(given)
    assert (found[others] == expected[others]).all()
    assert (found[7] == codec.encode(np.zeros((1, WIDTH), np.float32))[0]).all()
    assert (found[9] == found[7]).all()


def test_what_a_codec_cannot_be_fitted_to() -> None:
    with pytest.raises(DataError, match="pca-8 is fitted to 8 rows or more, got 7"):
        fit(Format("float16", 8), vectors(7))
    with pytest.raises(DataError, match="int8 is fitted to 1 rows or more, got 0"):
        fit(Format("int8"), vectors(3)[:0])
    with pytest.raises(RecipeError, match="keeps 24 of 24 columns"):
        fit(Format("float16", WIDTH), vectors(100))


def test_one_row_and_a_column_that_never_moves() -> None:
    given = vectors(1)
    codec = fit(Format("int8"), given)
    np.testing.assert_allclose(codec.decode(codec.encode(given).astype(np.float32)), given)
    given = vectors(50)
    given[:, 5] = 0.25
    codec = fit(Format("int8"), given)
    assert (codec.decode(codec.encode(given).astype(np.float32))[:, 5] == 0.25).all()


def test_spread_takes_from_end_to_end() -> None:
    assert spread(10, 5).tolist() == [0, 2, 4, 6, 8]
    assert spread(3, 5).tolist() == [0, 1, 2]
    assert spread(0, 5).tolist() == []
    assert len(set(spread(34_748, 16_384))) == 16_384


# What is lost


def test_the_distortion_is_that_of_a_dense_oracle(form: str) -> None:
    given = vectors(300)
    codec = fit(Format.parse(form), given)
    back = codec.decode(codec.encode(given).astype(np.float32))
    found = measure(given, codec.encode(given), codec)
    lost = 1 - cosines(back, given)
    unit = [x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True) for x in (given, back)]
    pairs = np.abs(unit[0] @ unit[0].T - unit[1] @ unit[1].T)[~np.eye(300, dtype=bool)].mean()
    assert found.rows == 300
    np.testing.assert_allclose([found.mean, found.worst, found.pairs], [lost.mean(), lost.max(), pairs], rtol=1e-3)


def test_no_rows_and_one_row_have_a_distortion() -> None:
    codec = fit(Format("int8"), vectors(50))
    assert measure(vectors(3)[:0], codec.encode(vectors(3)[:0]), codec) == Distortion(0, 0.0, 0.0, 0.0)
    assert measure(vectors(1), codec.encode(vectors(1)), codec).pairs == 0.0


def test_distortions_add_up_by_rows() -> None:
    parts = [Distortion(1, 0.1, 0.2, 0.3), Distortion(3, 0.5, 0.6, 0.7), Distortion(0, 0.0, 0.0, 0.0)]
    both = Distortion.over(parts)
    assert both is not None
    np.testing.assert_allclose([both.rows, both.mean, both.worst, both.pairs], [4, 0.4, 0.6, 0.6])
    assert Distortion.over([]) is None
    assert str(both) == "1 - cosine 4.0e-01 on average, 6.0e-01 at worst; cosines of pairs off by 6.0e-01"


# In a store


def test_a_compressed_store_gives_back_what_it_says(small: Store) -> None:
    given, opened = vectors(), Store.open(small.path, FINGERPRINT)
    back = opened.vectors([f"text {i}" for i in range(200)])
    assert back.shape == (200, WIDTH)
    assert back.dtype == torch.float32
    assert torch.equal(back, small.take(np.r_[0:100, 100:200]))
    lost = 1 - cosines(back.numpy(), given)
    assert opened.distortion is not None
    assert opened.distortion.rows == 200
    np.testing.assert_allclose([opened.distortion.mean, opened.distortion.worst], [lost.mean(), lost.max()], rtol=1e-3)
    torch.testing.assert_close(opened.take(np.array([5, 0, 5])), back[[5, 0, 5]], rtol=0, atol=1e-6)
    assert opened.take(np.array([], dtype=int)).shape == (0, WIDTH)
    assert verify(small.path) == {}


def test_a_shard_has_the_bytes_that_are_stated(form: str, tmp_path: Path) -> None:
    given = vectors(4000)
    made = make(tmp_path, form, given)
    assert made.row_bytes == {"int8": 24, "pca-8": 16, "pca-8-int8": 8}[form] + 21
    assert 0 <= sum(shard.bytes for shard in made.shards) - 4000 * made.row_bytes < 2 * 600


def test_rows_that_were_set_aside_come_back_as_what_their_flag_says(form: str, tmp_path: Path) -> None:
    given, flags = vectors(60), np.full(60, GOOD)
    given[3], given[4], flags[3:6] = np.nan, 0.0, [NOT_FINITE, ZERO, NO_TOKENS]
    made = Store.open_or_create(tmp_path, FINGERPRINT, WIDTH, codec=fit(Format.parse(form), vectors()))
    made.publish(made.append(rows(given, flags)))
    back = Store.open(tmp_path).take(np.arange(60))
    assert back[3].isnan().all()
    assert not back[4].any()
    assert back[5:].isfinite().all()
    assert made.distortion is not None
    assert made.distortion.rows == 57


def test_float16_is_written_as_the_first_release_wrote_it(tmp_path: Path) -> None:
    given = rows(vectors(5))
    made = Store.open_or_create(tmp_path / "new", FINGERPRINT, WIDTH)
    made.publish(made.append(given))
    expected = {
        "vectors": given.vectors.astype(np.float16),
        "keys": given.keys,
        "token_counts": given.token_counts.astype(np.int32),
        "flags": given.flags.astype(np.uint8),
    }
    save_file(expected, tmp_path / "expected")
    assert (tmp_path / "new" / made.shards[0].file).read_bytes() == (tmp_path / "expected").read_bytes()
    manifest = {
        "format": "distill-store",
        "version": 1,
        "fingerprint": FINGERPRINT,
        "width": WIDTH,
        "dtype": "float16",
        "shards": [
            {
                "file": made.shards[0].file,
                "rows": 5,
                "bytes": (tmp_path / "expected").stat().st_size,
                "sha256": files.sha256(tmp_path / "expected"),
            }
        ],
    }
    assert (tmp_path / "new" / "manifest.json").read_text() == json.dumps(manifest, indent=2) + "\n"
    assert made.distortion is None
    assert [item.name for item in (tmp_path / "new").glob("codec*")] == []


def test_a_second_writer_gives_the_same_bits_with_the_codec_of_the_first(small: Store, tmp_path: Path) -> None:
    later = Store.open_or_create(small.path, FINGERPRINT, WIDTH, codec=fit(Format("int8"), vectors(seed=9)))
    assert str(later.codec.format) == str(small.codec.format)
    new = rows(vectors(30, seed=3), prefix="more")
    later.publish(later.append(new))
    assert (small.codec.encode(new.vectors) == later.codec.encode(new.vectors)).all()
    assert len(Store.open(small.path)) == 230


def test_stores_of_two_codecs_are_two_things_to_train_on(small: Store, form: str, tmp_path: Path) -> None:
    again, other = make(tmp_path / "again", form, vectors()), make(tmp_path / "other", form, vectors(seed=9))
    assert (small.identity, small.digest) == (again.identity, again.digest)
    assert small.identity != other.identity
    assert small.digest != other.digest


def test_space_is_asked_for_by_the_true_bytes(small: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    needed = 1000 * small.row_bytes * 11 // 10
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 0, needed))
    small.require_space(1000)
    with pytest.raises(ResourceError, match="1,010 vectors of width 24 need"):
        small.require_space(1010)


def test_a_missing_shard_is_forgotten_and_the_codec_stays(small: Store) -> None:
    (small.path / small.shards[0].file).unlink()
    completed = Store.open_or_create(small.path, FINGERPRINT, WIDTH)
    assert len(completed) == 100
    assert torch.equal(completed.take(np.arange(100)), small.take(np.arange(100, 200)))


def test_a_codec_that_no_manifest_names_is_an_orphan(small: Store) -> None:
    stray = small.path / f"codec-{'0' * 24}.safetensors"
    stray.write_text("half")
    opened = Store.open(small.path)
    with opened.lock():
        assert opened.remove_orphans() == [stray.name]
    assert verify(small.path) == {}


def test_a_creation_that_was_killed_between_codec_and_manifest_is_made_good(small: Store) -> None:
    (small.path / "manifest.json").unlink()
    for shard in small.shards:
        (small.path / shard.file).unlink()
    again = Store.open_or_create(small.path, FINGERPRINT, WIDTH, codec=small.codec)
    assert len(again) == 0


# Damage


def test_a_damaged_codec_is_found_at_open_and_by_verify_and_not_mended(small: Store, capsys: Any) -> None:
    path = next(small.path.glob("codec-*"))
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(IntegrityError, match=r"codec-.*damaged: its content differs from its sha256(.|\n)*embed anew"):
        Store.open(small.path)
    assert list(verify(small.path)) == [path.name]
    assert main(["repair", str(small.path)]) == 4
    assert len([*small.path.glob("rows-*")]) == 2
    assert main(["verify", str(small.path)]) == 4
    assert "2 of 2 shards are whole" in capsys.readouterr().out
    path.unlink()
    with pytest.raises(IntegrityError, match="missing or damaged"):
        Store.open(small.path)
    assert list(verify(small.path)) == [path.name]


def test_a_codec_of_other_shapes_is_refused(small: Store) -> None:
    path = next(small.path.glob("codec-*"))
    arrays = load_file(path)
    more = {"more": np.zeros(3, np.float32)}
    for other in ({name: array[:-1] for name, array in arrays.items()}, arrays | more, more):
        save_file(other, path)
        change(small, lambda m: m["codec"].update(sha256=files.sha256(path)))
        with pytest.raises(IntegrityError, match="it holds"):
            Store.open(small.path)


CHANGES: list[dict[str, Any]] = [
    {"version": 1},
    {"version": 3},
    {"version": True},
    {"dtype": "float16"},
    {"dtype": "int4"},
    {"dtype": None},
    {"dtype": ["int8"]},
    {"dtype": "pca-24"},
    {"dtype": "pca-9999999"},
    {"codec": None},
    {"codec": "codec"},
    {"codec": {}},
    {"codec": {"file": "../../etc/passwd", "bytes": 3, "sha256": "0" * 64}},
    {"codec": {"file": f"rows-{'0' * 24}.safetensors", "bytes": 3, "sha256": "0" * 64}},
    {"codec": {"file": f"codec-{'0' * 24}.safetensors", "bytes": 3, "sha256": "x"}},
]


@pytest.mark.parametrize("change_", CHANGES, ids=str)
def test_hostile_manifests_of_compressed_stores(small: Store, change_: dict[str, Any]) -> None:
    change(small, lambda manifest: manifest.update(change_))
    for read in (Store.open, verify):
        with pytest.raises(IntegrityError, match=r"manifest\.json is damaged"):
            read(small.path)


def test_another_format_than_that_of_the_shards_is_refused(small: Store) -> None:
    other = {"int8": "pca-8-int8", "pca-8": "pca-8-int8", "pca-8-int8": "pca-7-int8"}[str(small.codec.format)]
    change(small, lambda manifest: manifest.update(dtype=other))
    with pytest.raises(IntegrityError, match="damaged"):
        Store.open(small.path)
    assert len(verify(small.path)) == 3


@pytest.mark.parametrize(
    "distortion",
    [
        None,
        {},
        {"rows": 5},
        {"rows": 101, "mean": 0.0, "worst": 0.0, "pairs": 0.0},
        {"rows": -1, "mean": 0.0, "worst": 0.0, "pairs": 0.0},
        {"rows": 5, "mean": -1.0, "worst": 0.0, "pairs": 0.0},
        {"rows": 5, "mean": float("nan"), "worst": 0.0, "pairs": 0.0},
        {"rows": 5, "mean": "0", "worst": 0.0, "pairs": 0.0},
        {"rows": 5, "mean": 0.0, "worst": 99.0, "pairs": 0.0},
    ],
    ids=str,
)
def test_hostile_distortions(small: Store, distortion: Any) -> None:
    change(small, lambda manifest: manifest["shards"][0].update(distortion=distortion))
    with pytest.raises(IntegrityError, match=r"manifest\.json is damaged"):
        Store.open(small.path)
    change(small, lambda manifest: manifest["shards"][0].pop("distortion"))
    with pytest.raises(IntegrityError, match=r"manifest\.json is damaged"):
        Store.open(small.path)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["int8", 2, "pca-8"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@few
@given(data=st.data())
def test_mutated_manifests_are_documented_errors_or_read(small: Store, data: st.DataObject) -> None:
    path = small.path / "manifest.json"
    original = path.read_text()
    try:
        manifest = json.loads(original)
        place = data.draw(st.sampled_from([manifest, manifest["codec"], manifest["shards"][0]["distortion"]]))
        place[data.draw(st.sampled_from([*place, "new"]))] = data.draw(JSON)
        path.write_text(json.dumps(manifest))
        for read in (verify, lambda path: Store.open(path).take(np.arange(1))):
            with contextlib.suppress(DistillError, IndexError):
                read(small.path)
    finally:
        path.write_text(original)


# Two steps: a float16 store, written anew


@pytest.fixture
def plain(tmp_path: Path) -> Store:
    """Ninety good rows and some others, in three shards."""
    made = Store.open_or_create(tmp_path / "plain", FINGERPRINT, WIDTH)
    given, flags = vectors(100), np.full(100, GOOD)
    flags[::10], given[::10] = NOT_FINITE, np.nan
    whole = rows(given, flags)
    for part in (slice(0, 30), slice(30, 35), slice(35, None)):
        made.publish(made.append(Rows(*(column[part] for column in vars(whole).values()))))
    return made


def test_a_store_is_compressed_into_a_new_one(plain: Store, form: str, tmp_path: Path) -> None:
    made = compress(plain.path, tmp_path / "new", form)
    assert made.fingerprint == plain.fingerprint
    assert (made.keys == plain.keys).all()
    assert (made.flags == plain.flags).all()
    assert (made.token_counts == plain.token_counts).all()
    good = np.flatnonzero(plain.flags == GOOD)
    lost = 1 - cosines(made.take(good).numpy(), plain.take(good).numpy())
    assert made.distortion is not None
    assert made.distortion.rows == 90
    np.testing.assert_allclose(made.distortion.worst, lost.max(), rtol=1e-3)
    assert lost.max() < (1e-3 if form == "int8" else 0.5)
    assert len(made.shards) == 1
    again = compress(plain.path, tmp_path / "again", form)
    assert [shard.sha256 for shard in again.shards] == [shard.sha256 for shard in made.shards]


def test_what_is_compressed_already_is_not_compressed_again(plain: Store, tmp_path: Path) -> None:
    small = compress(plain.path, tmp_path / "small", "int8")
    with pytest.raises(RecipeError, match=r"small holds int8, and pca-8 was asked for"):
        compress(small.path, tmp_path / "smaller", "pca-8")
    with pytest.raises(RecipeError, match="holds float16, and float16 was asked for"):
        compress(plain.path, tmp_path / "same", "float16")
    with pytest.raises(RecipeError, match="small is there already"):
        compress(plain.path, small.path, "int8")
    assert sorted(item.name for item in tmp_path.iterdir() if item.name[0] != ".") == ["plain", "small"]


def test_an_error_in_the_middle_leaves_nothing(plain: Store, tmp_path: Path) -> None:
    def broken() -> Any:
        yield rows(vectors(10))
        raise MemoryError("no room")

    with pytest.raises(MemoryError):
        write_store(tmp_path / "new", FINGERPRINT, WIDTH, broken(), rows=20)
    assert sorted(item.name for item in tmp_path.iterdir()) == [".new-lock", "plain"]


def test_a_killed_compression_leaves_no_store_and_the_next_cleans_up(plain: Store, tmp_path: Path) -> None:
    program = f"""
import os, signal
from distill.store import Store, compress
append = Store.append
Store.append = lambda self, rows: (append(self, rows), os.kill(os.getpid(), signal.SIGKILL))
compress({str(plain.path)!r}, {str(tmp_path / "new")!r}, "int8")
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    done = subprocess.run([sys.executable, "-c", program], env=environment, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "new").exists()
    assert len([*tmp_path.glob(".new.*")]) == 1
    assert len(compress(plain.path, tmp_path / "new", "int8")) == 100
    assert [*tmp_path.glob(".new.*")] == []


def test_the_fit_is_to_a_sample_of_good_rows(plain: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compression, "FIT_ROWS", 40)
    good, form = np.flatnonzero(plain.flags == GOOD), Format("int8", 8)
    sample, every = (fit(form, plain.take(some).numpy()).arrays() for some in (good[np.arange(40) * 90 // 40], good))
    found = plain.fit(form).arrays()
    assert found.keys() == {"rotation", "centre", "scale"}
    for name, array in found.items():
        np.testing.assert_array_equal(array, sample[name])
        assert not np.array_equal(array, every[name])


def test_the_commands(plain: Store, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["compress", str(plain.path), str(tmp_path / "new"), "--as", "pca-8-int8"]) == 0
    out = capsys.readouterr().out
    assert "100 rows as pca-8-int8" in out
    assert "1 - cosine" in out
    assert main(["info", str(tmp_path / "new")]) == 0
    out = capsys.readouterr().out
    assert "stored as: pca-8-int8, 29 bytes a row" in out
    assert f"lost by that: {Store.open(tmp_path / 'new').distortion}" in out
    assert main(["info", str(plain.path)]) == 0
    out = capsys.readouterr().out
    assert "stored as: float16, 69 bytes a row" in out
    assert "lost" not in out
    assert main(["compress", str(plain.path), str(tmp_path / "new"), "--as", "zip"]) == 2
    assert "not as 'zip'" in capsys.readouterr().err
    raw = bytearray((plain.path / plain.shards[0].file).read_bytes())
    assert main(["compress", str(plain.path), str(tmp_path / "other")]) == 0
    assert str(Store.open(tmp_path / "other").codec.format) == "int8"
    assert (plain.path / plain.shards[0].file).read_bytes() == raw


REAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "teacher" / "vectors-0.npy"


@pytest.mark.skipif(not REAL.exists(), reason="needs ../shared/data/teacher")
def test_what_real_vectors_lose(tmp_path: Path) -> None:
    given = np.asarray(np.load(REAL, mmap_mode="r")[:4000]).astype(np.float32)
    most = {"int8": (1e-4, 2e-3), "pca-384": (0.06, 0.4)}
    for name, (mean, worst) in most.items():
        codec = fit(Format.parse(name), given[:3000])
        found = measure(given[3000:], codec.encode(given[3000:]), codec)
        assert found.mean < mean, (name, found)
        assert found.worst < worst, (name, found)
