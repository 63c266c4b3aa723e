"""Vectors that were written come back, from the right encoder, or the store says what is wrong with it."""

import contextlib
import json
import re
import shutil
import struct
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distill import files
from distill.errors import DataError, DistillError, IntegrityError, RecipeError, ResourceError
from distill.store import (
    GOOD,
    NO_TOKENS,
    NOT_FINITE,
    ZERO,
    Rows,
    Store,
    shards,
    sharing,
    text_keys,
    vectors,
    verify,
    write_store,
)
from distill.store.__main__ import main

FINGERPRINT: dict[str, Any] = {"weights": "ab" * 32, "max_length": 64, "modules": "Bert > mean"}
WIDTH = 4
few = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def rows(texts: list[str], flags: int = GOOD, width: int = WIDTH) -> Rows:
    """Vectors that can be told apart: row i is i, i + .1, ..."""
    vectors = np.arange(len(texts))[:, None] + np.arange(width) / 10
    return Rows(vectors, text_keys(texts), np.arange(len(texts)), np.full(len(texts), flags))


def write(path: Path, *batches: list[str]) -> Store:
    made = Store.open_or_create(path, FINGERPRINT, WIDTH)
    for texts in batches:
        made.publish(made.append(rows(texts)))
    return Store.open(path, FINGERPRINT)


@pytest.fixture
def two(tmp_path: Path) -> Store:
    """Two shards of three texts."""
    return write(tmp_path / "store", ["a", "b", "c"], ["d", "e", "f"])


# What is written comes back


def test_rows_that_float16_cannot_keep_are_not_good(tmp_path: Path) -> None:
    vectors = np.array([[1e5, 1, 1, 1], [1e-9, 0, 0, 0], [np.nan, 1, 1, 1], [1, 2, 3, 4], [1, 2, 3, 4]])
    given = Rows(vectors, text_keys(list("abcde")), np.zeros(5, int), np.array([0, 0, 0, 0, 3]))
    made = write_store(tmp_path / "new", FINGERPRINT, WIDTH, [given], rows=5)
    assert made.flags.tolist() == [NOT_FINITE, ZERO, NOT_FINITE, GOOD, NO_TOKENS]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vectors": np.ones((3, WIDTH))}, r"keys \(2, 2\), not \(3, 2\); token_counts .* flags \(2,\)"),
        ({"vectors": np.ones((2, 7))}, r"width 4 have vectors \(2, 7\), not \(2, 4\)"),
        ({"keys": np.zeros((2, 2), np.int64)}, "keys of int64, not those of text_keys"),
        ({"flags": np.array([0])}, r"flags \(1,\), not \(2,\)"),
    ],
)
def test_rows_whose_parts_do_not_fit_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        write_store(tmp_path / "new", FINGERPRINT, WIDTH, [replace(rows(["a", "b"]), **change)], rows=2)
    assert not (tmp_path / "new").exists()


def test_a_text_is_in_a_store_once(tmp_path: Path) -> None:
    for number, blocks in enumerate(([["a", "b"], ["c", "a"]], [["a"], ["a"]], [["a", "a"]])):
        with pytest.raises(DataError, match=r"1 rows have the key of an earlier one, row \d first"):
            write_store(tmp_path / str(number), FINGERPRINT, WIDTH, map(rows, blocks), rows=4)
        assert not (tmp_path / str(number)).exists()


OPENED = """
import resource, sys
from distill.store import Store
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
store = Store.open(sys.argv[1])
assert store.take(store.find(store.keys)).tolist() == [[0.0, 0.0999755859375, 0.199951171875, 0.300048828125]] * 100
"""


def test_shards_may_be_more_than_the_files_that_a_process_may_open(tmp_path: Path) -> None:
    write(tmp_path / "store", *[[str(number)] for number in range(100)])
    done = subprocess.run([sys.executable, "-c", OPENED, str(tmp_path / "store")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_store_takes_the_place_of_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RecipeError, match="is there already"):
        write_store(tmp_path / "file", FINGERPRINT, WIDTH, [rows(["a"])], rows=1)
    assert (tmp_path / "file").read_text() == "mine"


def test_one_text_is_no_list_of_its_letters() -> None:
    with pytest.raises(DataError, match="Put it in a list"):
        text_keys("abc")


@pytest.mark.usefixtures("unchecked")
def test_what_is_no_text_has_no_key(two: Store) -> None:
    with pytest.raises(DataError, match=r"text 1 is NoneType None; a str is expected"):
        two.vectors(["a", None])  # type: ignore[list-item]
    with pytest.raises(DataError, match=r"keys are of texts: 'int'"):
        text_keys(iter(["a", 5]))  # type: ignore[list-item]


def test_round_trip_to_fp16(tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).normal(size=(50, 7)).astype(np.float32)
    texts = [f"text {i}" for i in range(50)]
    made = Store.open_or_create(tmp_path, FINGERPRINT, 7)
    made.publish(made.append(Rows(vectors, text_keys(texts), np.arange(50), np.arange(50) % 4)))
    opened = Store.open(tmp_path, FINGERPRINT)
    for one in (made, opened):
        assert torch.equal(one.vectors(texts), torch.from_numpy(vectors.astype(np.float16).astype(np.float32)))
        assert one.token_counts.tolist() == [*range(50)]
        assert one.flags.tolist() == [i % 4 for i in range(50)]
        assert len(one) == 50


def test_rows_are_found_and_taken_in_any_order_and_more_than_once(two: Store) -> None:
    found = two.find(text_keys(["f", "nobody", "a", "f", "d"]))
    assert found.tolist() == [5, -1, 0, 5, 3]
    assert two.take(np.array([5, 0, 5, 3, 2]))[:, 0].tolist() == [2, 0, 2, 0, 2]
    assert two.take(np.array([], dtype=int)).shape == (0, WIDTH)
    assert two.find(text_keys([])).tolist() == []
    for wrong in ([6], [-1], [0, 6]):
        with pytest.raises(IndexError, match=r"rows are 0\.\.5"):
            two.take(np.array(wrong))
    with pytest.raises(IntegrityError, match=r"no vector for 2 of 3 texts, the first is row 1: 'x'"):
        two.vectors(["a", "x", "y"])


@pytest.mark.parametrize("numbers", [np.array([True, False, True, False, False, False]), np.array([0.0, 1.9])])
def test_what_is_no_number_of_a_row_is_refused(two: Store, numbers: np.ndarray) -> None:
    with pytest.raises(TypeError, match=r"integers, got (bool|float64); numpy\.flatnonzero"):
        two.take(numbers)
    assert two.take(np.array([])).shape == (0, WIDTH)


def test_an_empty_store_finds_nothing(tmp_path: Path) -> None:
    empty = write(tmp_path)
    assert empty.find(text_keys(["a"])).tolist() == [-1]
    assert empty.take(np.array([], dtype=int)).shape == (0, WIDTH)
    assert empty.append(rows([])) == []


def test_shards_end_at_their_row_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectors, "SHARD_ROWS", 4)
    for count, expected in ((3, [3]), (4, [4]), (5, [4, 1]), (8, [4, 4])):
        texts = [f"{i}" for i in range(count)]
        made = write(tmp_path / str(count), texts)
        assert [shard.rows for shard in made.shards] == expected
        assert made.vectors(texts)[:, 0].tolist() == [*range(count)]


def test_keys_tell_kind_prompt_and_text_apart() -> None:
    named = [
        text_keys(["a"]),
        text_keys(["a"], prompt="q: "),
        text_keys(["q: a"]),
        text_keys([": a"], prompt="q"),
        text_keys(["a"], kind="token"),
        text_keys(["a\0"]),
        text_keys([" a"]),
        text_keys([""]),
        text_keys(["\ud800"]),
    ]
    assert len({key.tobytes() for key in named}) == len(named)
    assert text_keys(["a", "b", "a"]).tolist() == [*named[0].tolist(), *text_keys(["b"]).tolist(), *named[0].tolist()]
    assert text_keys([]).shape == (0, 2)


def test_keys_do_not_change_between_releases() -> None:
    assert text_keys(["Ein Text"], prompt="query: ").tobytes().hex() == "808344595d0917c8b175d7aa10aa3ba7"


@given(st.lists(st.binary(min_size=16, max_size=16), min_size=1, max_size=20, unique=True))
@settings(deadline=None, max_examples=50)
def test_any_keys_are_found_where_they_stand(keys: list[bytes]) -> None:
    made = Store(Path("nowhere"), {}, WIDTH, [])
    made.keys = np.frombuffer(b"".join([*keys, *(key[:8] + bytes(8) for key in keys)]), "<u8").reshape(-1, 2)
    expected = [next(i for i, key in enumerate(made.keys) if key.tobytes() == wanted) for wanted in keys]
    assert made.find(made.keys[: len(keys)]).tolist() == expected


# The manifest


def test_rows_count_only_once_the_manifest_names_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = write(tmp_path, ["a"])
    records = made.append(rows(["b"]))
    assert (tmp_path / records[0].file).exists()
    assert len(Store.open(tmp_path)) == 1
    assert made.orphans() == [records[0].file]
    code, out, _ = command(capsys, "verify", tmp_path)
    assert code == 0
    assert out.startswith(f"{records[0].file}: not in the manifest")
    (tmp_path / ".rows-x.safetensors.tmp").write_text("half")
    (tmp_path / ".manifest.json.tmp").write_text("half")
    with made.lock():
        assert Store.open(tmp_path).remove_orphans() == [records[0].file]
    assert sorted(item.name for item in tmp_path.iterdir()) == [".lock", "manifest.json", made.shards[0].file]
    assert Store.open(tmp_path).vectors(["a"])[0, 0] == 0


def test_a_store_that_has_looked_for_a_row_finds_one_that_is_published_later(two: Store) -> None:
    later = text_keys(["a", "z"])
    assert two.find(later).tolist() == [0, -1]
    two.publish(two.append(rows(["z"])))
    assert two.find(later).tolist() == [0, 6]


def test_another_fingerprint_is_refused_and_every_differing_field_named(two: Store) -> None:
    for field in FINGERPRINT:
        with pytest.raises(IntegrityError, match="another encoder") as caught:
            Store.open(two.path, FINGERPRINT | {field: "other"})
        named = [line.split(":")[0].strip() for line in str(caught.value).splitlines()[1:-1]]
        assert named == [field]
    with pytest.raises(IntegrityError, match=r"lowercase: store None, this encoder 1"):
        Store.open(two.path, FINGERPRINT | {"lowercase": 1})
    with pytest.raises(IntegrityError, match="weights"):
        Store.open_or_create(two.path, {"max_length": 64, "modules": "Bert > mean"}, WIDTH)


def test_a_moved_store_works(two: Store, tmp_path: Path) -> None:
    shutil.move(two.path, tmp_path / "elsewhere")
    assert Store.open(tmp_path / "elsewhere", FINGERPRINT).vectors(["e"])[0, 0] == 1
    assert verify(tmp_path / "elsewhere") == {}


def test_reading_writes_nothing_and_needs_no_lock(two: Store) -> None:
    (two.path / ".lock").unlink()
    before = {item.name: item.stat().st_mtime_ns for item in two.path.iterdir()}
    two.path.chmod(0o555)
    try:
        opened = Store.open_or_create(two.path, FINGERPRINT, WIDTH)
        assert opened.vectors(["a", "f"]).shape == (2, WIDTH)
        assert verify(two.path) == {}
    finally:
        two.path.chmod(0o755)
    assert {item.name: item.stat().st_mtime_ns for item in two.path.iterdir()} == before


def test_a_folder_with_other_things_is_no_store(tmp_path: Path) -> None:
    (tmp_path / "thesis.docx").write_text("")
    with pytest.raises(RecipeError, match=r"other things in it \(thesis.docx\)"):
        Store.open_or_create(tmp_path, FINGERPRINT, WIDTH)
    assert [item.name for item in tmp_path.iterdir()] == ["thesis.docx"]
    with pytest.raises(IntegrityError, match="is not a store"):
        Store.open(tmp_path)


def test_shards_without_their_manifest_are_not_deleted(two: Store) -> None:
    (two.path / "manifest.json").unlink()
    with pytest.raises(RecipeError, match=r"no manifest\.json.*bring its manifest back"):
        Store.open_or_create(two.path, FINGERPRINT, WIDTH)
    assert len([*two.path.glob("rows-*")]) == 2


# Space


def test_too_little_space_is_said_before_anything_is_written(two: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 0, 1000))
    two.require_space(10)
    with pytest.raises(ResourceError, match=r"1,000,000 vectors of width 4 need 31,900,000 bytes.*1,000 are free"):
        two.require_space(1_000_000)


def test_a_full_disk_leaves_what_is_stored(two: Store) -> None:
    """A real write error: the system refuses files of more than 4 KiB to this child."""
    program = f"""
import resource
import numpy as np
from distill.errors import ResourceError
from distill.store import Rows, Store
store = Store.open({str(two.path)!r})
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
keys = np.arange(4000, dtype=np.uint64).reshape(-1, 2)
try:
    store.append(Rows(np.ones((2000, {WIDTH})), keys, np.ones(2000), np.zeros(2000)))
except ResourceError as error:
    print("refused:", error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.startswith("refused: 2,000 rows cannot be written"), done
    assert verify(two.path) == {}
    assert [item.name for item in two.path.iterdir() if item.name.startswith(".rows")] == []


# Damage


def shard_path(damaged: Store, number: int = 0) -> Path:
    return damaged.path / damaged.shards[number].file


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [_truncate, _lengthen, _empty, _folder, Path.unlink])
def test_a_shard_of_another_size_is_found_at_open_and_by_verify(two: Store, damage: Callable[[Path], None]) -> None:
    damage(shard_path(two, 1))
    with pytest.raises(IntegrityError, match=re.escape(two.shards[1].file)) as caught:
        Store.open(two.path)
    assert "embed() again: only its 3 rows" in str(caught.value)
    assert list(verify(two.path)) == [two.shards[1].file]
    assert len(Store.open(write(two.path.parent / "other", ["a"]).path)) == 1


def test_a_flipped_vector_is_found_by_verify(two: Store) -> None:
    path, raw = shard_path(two), bytearray(shard_path(two).read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    assert len(Store.open(two.path)) == 6
    assert verify(two.path) == {path.name: "content differs from its sha256"}


def test_every_flip_of_the_header_is_a_documented_error_or_harmless(two: Store) -> None:
    path, raw = shard_path(two), shard_path(two).read_bytes()
    end = 8 + struct.unpack("<Q", raw[:8])[0]
    refused = 0
    for place in range(end):
        for bit in (1, 4, 32, 128):
            path.write_bytes(raw[:place] + bytes([raw[place] ^ bit]) + raw[place + 1 :])
            try:
                Store.open(two.path).take(np.arange(6))
            except IntegrityError:
                refused += 1
            assert list(verify(two.path)) == [path.name]
    assert refused > end


@pytest.mark.slow
def test_random_flips_and_truncations_are_all_named(two: Store) -> None:
    path, raw, draw = shard_path(two), shard_path(two).read_bytes(), np.random.default_rng(0)
    for _ in range(2000):
        place = int(draw.integers(len(raw)))
        path.write_bytes(raw[:place] + bytes([raw[place] ^ (1 << int(draw.integers(8)))]) + raw[place + 1 :])
        assert list(verify(two.path)) == [path.name]
    for length in range(len(raw)):
        path.write_bytes(raw[:length])
        assert list(verify(two.path)) == [path.name]


HEADERS = [
    b"[" * 100_000,
    b"{}",
    b"[]",
    b"null",
    b'{"vectors": 5, "keys": 5, "token_counts": 5, "flags": 5}',
    b"\xff\xfe{",
    b"9" * 5000,
]


@pytest.mark.parametrize("header", HEADERS, ids=range(len(HEADERS)))
def test_hostile_headers(two: Store, header: bytes) -> None:
    _replace_header(two, header)
    with pytest.raises(IntegrityError, match="is damaged"):
        Store.open(two.path)


@pytest.mark.parametrize("column", ["vectors", "keys", "token_counts", "flags"])
@pytest.mark.parametrize(
    "entry",
    [
        {"data_offsets": [10**30, 10**30 + 24]},
        {"data_offsets": [-24, 0]},
        {"data_offsets": [0.0, 24.0]},
        {"data_offsets": ["a", "b"]},
        {"data_offsets": [0]},
        {"data_offsets": None},
        {"shape": [1 << 40, 1 << 40]},
        {"shape": "3"},
        {"dtype": "F64"},
        {"dtype": ["F16"]},
    ],
    ids=str,
)
def test_hostile_columns(two: Store, column: str, entry: dict[str, Any]) -> None:
    raw = shard_path(two).read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + size])
    header[column] |= entry
    _replace_header(two, json.dumps(header).encode())
    with pytest.raises(IntegrityError, match="is damaged"):
        Store.open(two.path)


def _replace_header(damaged: Store, header: bytes) -> None:
    """A shard with this header, which the manifest agrees with."""
    path, raw = shard_path(damaged), shard_path(damaged).read_bytes()
    data = raw[8 + struct.unpack("<Q", raw[:8])[0] :]
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    manifest = json.loads((damaged.path / "manifest.json").read_text())
    manifest["shards"][0] |= {"bytes": path.stat().st_size, "sha256": files.sha256(path)}
    (damaged.path / "manifest.json").write_text(json.dumps(manifest))


def test_a_header_that_claims_too_much_is_not_read(two: Store) -> None:
    path, raw = shard_path(two), bytearray(shard_path(two).read_bytes())
    for claim in (1 << 62, len(raw), len(raw) - 7):
        raw[:8] = struct.pack("<Q", claim)
        path.write_bytes(raw)
        with pytest.raises(IntegrityError, match="its header claims"):
            Store.open(two.path)


MANIFESTS: list[Any] = [
    "",
    "[" * 100_000,
    "null",
    "[]",
    "{}",
    "\udcff",
    {"format": "other"},
    {"version": 2},
    {"dtype": "float32"},
    {"fingerprint": None},
    {"width": 0},
    {"width": -1},
    {"width": True},
    {"width": 4.0},
    {"width": 1 << 60},
    {"width": "4"},
    {"shards": None},
    {"shards": "rows"},
    {"shards": {"a": 1}},
    {"shards": [None]},
    {"shards": [{}]},
]
SHARDS: list[dict[str, Any]] = [
    {"file": "../../etc/passwd"},
    {"file": "/etc/passwd"},
    {"file": "rows-..%2f.safetensors"},
    {"file": "rows-" + "0" * 24 + ".safetensors\n"},
    {"file": None},
    {"file": ["rows-" + "0" * 24 + ".safetensors"]},
    {"rows": 0},
    {"rows": -3},
    {"rows": True},
    {"rows": 3.0},
    {"rows": 1 << 40},
    {"rows": "3"},
    {"bytes": 0},
    {"bytes": None},
    {"sha256": "x"},
    {"sha256": int("1" * 64)},
    {"sha256": None},
    {"more": 1},
]


@pytest.mark.parametrize("change", MANIFESTS, ids=lambda change: str(change)[:20])
def test_hostile_manifests(two: Store, change: Any) -> None:
    path = two.path / "manifest.json"
    text = change if isinstance(change, str) else json.dumps(json.loads(path.read_text()) | change)
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    for read in (Store.open, verify):
        with pytest.raises(IntegrityError, match=r"manifest\.json is damaged"):
            read(two.path)


@pytest.mark.parametrize("change", SHARDS, ids=str)
def test_hostile_shard_records(two: Store, change: dict[str, Any]) -> None:
    path = two.path / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["shards"][0] |= change
    path.write_text(json.dumps(manifest))
    with pytest.raises(IntegrityError, match=r"manifest\.json is damaged"):
        Store.open(two.path)


def test_a_shard_named_twice_is_refused(two: Store) -> None:
    path = two.path / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["shards"].append(manifest["shards"][0])
    path.write_text(json.dumps(manifest))
    with pytest.raises(IntegrityError, match="a shard is recorded as"):
        Store.open(two.path)


def test_a_manifest_that_is_a_folder_is_an_environment_error(two: Store) -> None:
    (two.path / "manifest.json").unlink()
    (two.path / "manifest.json").mkdir()
    with pytest.raises(ResourceError, match="cannot be read"):
        Store.open(two.path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["float16", 1, 3]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@few
@given(data=st.data())
def test_mutated_manifests_are_documented_errors_or_read(two: Store, data: st.DataObject) -> None:
    path = two.path / "manifest.json"
    original = path.read_text()
    try:
        manifest = json.loads(original)
        for _ in range(data.draw(st.integers(1, 3))):
            place = data.draw(st.sampled_from([manifest, *manifest["shards"]])) if _has_shards(manifest) else manifest
            key = data.draw(st.sampled_from([*place, "new"]))
            if data.draw(st.booleans()) and key in place:
                del place[key]
            else:
                place[key] = data.draw(JSON)
        path.write_text(json.dumps(manifest))
        for read in (verify, lambda path: Store.open(path).take(np.arange(1))):
            with contextlib.suppress(DistillError, IndexError):
                read(two.path)
    finally:
        path.write_text(original)


def _has_shards(manifest: dict[str, Any]) -> bool:
    shards = manifest.get("shards")
    return isinstance(shards, list) and all(isinstance(shard, dict) and shard for shard in shards)


@few
@given(raw=st.binary(max_size=200), keep=st.integers(0, 200))
def test_mutated_bytes_of_a_manifest_are_documented_errors(two: Store, raw: bytes, keep: int) -> None:
    path = two.path / "manifest.json"
    original = path.read_bytes()
    try:
        path.write_bytes(original[:keep] + raw)
        with pytest.raises(DistillError):
            Store.open(two.path)
    finally:
        path.write_bytes(original)


# Repair


def test_a_missing_shard_is_taken_out_when_the_store_is_completed(two: Store, capsys: pytest.CaptureFixture) -> None:
    shard_path(two).unlink()
    completed = Store.open_or_create(two.path, FINGERPRINT, WIDTH)
    assert completed.find(text_keys(["a", "d"])).tolist() == [-1, 0]
    assert two.shards[0].file in capsys.readouterr().err


# The command


def command(capsys: pytest.CaptureFixture, *arguments: object) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def test_verify_info_and_repair(two: Store, capsys: pytest.CaptureFixture) -> None:
    code, out, _ = command(capsys, "info", two.path)
    assert code == 0
    assert "max_length: 64" in out
    assert "rows: 6 of width 4, 2 shards" in out
    assert "set aside: none" in out
    assert command(capsys, "verify", two.path)[:2] == (0, f"{two.path}: 2 of 2 shards are whole\n")
    _truncate(shard_path(two))
    code, out, _ = command(capsys, "verify", two.path)
    assert (code, out.splitlines()[-1]) == (4, f"{two.path}: 1 of 2 shards are whole")
    assert two.shards[0].file in out
    assert command(capsys, "info", two.path)[0] == 4
    assert command(capsys, "repair", two.path)[0] == 0
    assert command(capsys, "verify", two.path)[0] == 0
    assert Store.open(two.path).find(text_keys(["a", "d"])).tolist() == [-1, 0]
    assert not shard_path(two).exists()


def test_what_cannot_be_read_now_is_not_taken_out(
    two: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def refused(*arguments: Any, **options: Any) -> None:
        raise PermissionError(13, "Permission denied")

    before = sorted(path.name for path in two.path.iterdir())
    monkeypatch.setattr(shards, "_read_header", refused)
    with pytest.raises(ResourceError, match=r"cannot be read: .*Permission denied"):
        Store.open(two.path)
    assert main(["repair", str(two.path)]) == ResourceError.exit_code
    assert "cannot be read" in capsys.readouterr().err
    assert sorted(path.name for path in two.path.iterdir()) == before
    monkeypatch.undo()
    assert len(Store.open(two.path)) == 6


def test_info_counts_what_is_set_aside(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    made = write(tmp_path, ["a"])
    for flag in (ZERO, NOT_FINITE, NO_TOKENS):
        made.publish(made.append(rows([f"text {flag}"], flag)))
    assert "set aside: 1 not finite, 1 zero vector, 1 no tokens" in command(capsys, "info", tmp_path)[1]


def test_the_command_line(two: Store, tmp_path: Path) -> None:
    for arguments, code in ((["verify", two.path], 0), (["info", tmp_path / "nothing"], 4), (["mend", two.path], 2)):
        program = [sys.executable, "-m", "distill.store", *map(str, arguments)]
        done = subprocess.run(program, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == code, done
        assert "Traceback" not in done.stderr


def test_the_shard_limit_is_the_one_that_manifests_are_checked_by() -> None:
    assert vectors.SHARD_ROWS == shards.SHARD_ROWS == 65_536


def test_export_hands_the_rows_on_with_their_texts(
    two: Store, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pyarrow import parquet

    monkeypatch.setattr(sharing, "SHARD_ROWS", 2)  # blocks
    two.publish(two.append(rows(["empty"], flags=NO_TOKENS)))
    texts, shared = tmp_path / "texts.txt", tmp_path / "vectors.parquet"
    texts.write_text("f\na\nempty\nc\n", encoding="utf-8")
    code, out, _ = command(capsys, "export", two.path, shared, "--texts", texts)
    assert code == 0
    assert out.startswith(f"{shared}: 3 rows, ")
    table = parquet.read_table(shared)
    assert table["text"].to_pylist() == ["f", "a", "c"]
    assert torch.equal(torch.tensor(table["embedding"].to_pylist()), two.vectors(["f", "a", "c"]))
    assert table["key"].to_pylist() == [key.tobytes().hex() for key in text_keys(["f", "a", "c"])]
    assert json.loads(table.schema.metadata[b"distill.fingerprint"]) == FINGERPRINT

    assert command(capsys, "export", two.path, shared)[0] == 0  # without texts: every good row, by key
    table = parquet.read_table(shared)
    assert table.column_names == ["key", "embedding"]
    assert len(table) == 6

    code, _, err = command(capsys, "export", two.path, shared, "--texts", texts, "--prompt", "query: ")
    assert code == 4
    assert "no vector for 4 of 4 texts" in err
    assert "now 'query: '" in err
    assert len(parquet.read_table(shared)) == 6
