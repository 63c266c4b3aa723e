"""The teacher's nearest neighbours against a sort of all cosines, and where they are kept."""

from pathlib import Path
from typing import Any

import numpy as np
import processes
import pytest
import torch
from filelock import Timeout
from safetensors.numpy import load_file, save_file

from distill.modules import Tokens
from distill.store import GOOD, Rows, Store, text_keys
from distill.training import Examples, mining, sampling
from distill.training.mining import hard_neighbours

COUNT, WIDTH = 41, 6
FINGERPRINT = {"weights": "ab" * 32}


def examples(path: Path, count: int = COUNT, seed: int = 0) -> tuple[Examples, Store]:
    """Random vectors of some lengths; rows of the store are not those of the texts."""
    texts = [f"text {number}" for number in range(count)]
    made = Store.open_or_create(path, FINGERPRINT, WIDTH)
    keys = text_keys(texts)
    if not len(made):
        vectors = np.random.default_rng(seed).normal(size=(count, WIDTH)) * np.arange(1, count + 1)[:, None]
        made.publish(made.append(Rows(vectors[::-1], keys[::-1], np.ones(count), np.full(count, GOOD))))
    short = torch.from_numpy(keys[:, 0].view(np.int64).copy())
    return Examples(texts, Tokens.from_lists([[1]] * count), made.find(keys), short), made


def cosines(data: Examples, store: Store) -> np.ndarray:
    vectors = store.take(data.rows).double().numpy()
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit @ unit.T


def expected(data: Examples, store: Store, count: int, margin: float) -> list[list[int]]:
    """Each row of the matrix, sorted."""
    found, keys = [], data.keys.tolist()
    for row, values in enumerate(cosines(data, store)):
        order = [int(i) for i in np.argsort(-values) if values[i] <= margin and keys[i] != keys[row]]
        found.append((order + [-1] * count)[:count])
    return found


@pytest.mark.parametrize("rows", [5, 7, 4096])
@pytest.mark.parametrize(("count", "margin"), [(3, 1.0), (3, 0.5), (40, 0.9), (60, 0.0)])
def test_neighbours_are_the_first_of_all_texts_sorted_by_cosine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int, count: int, margin: float
) -> None:
    monkeypatch.setattr(mining, "ROWS", rows)
    data, store = examples(tmp_path)
    found = hard_neighbours(data, store, count=count, margin=margin)
    assert found.dtype == np.int32
    assert found.tolist() == expected(data, store, count, margin)


def test_a_text_of_the_same_key_and_one_that_says_the_same_are_no_neighbours(tmp_path: Path) -> None:
    data, store = examples(tmp_path)
    matrix = cosines(data, store)
    nearest = hard_neighbours(data, store, count=5, margin=1.0)
    assert (nearest[:, 0] != np.arange(COUNT)).all()
    highest = matrix[np.arange(COUNT), nearest[:, 0]]
    margin = float(np.quantile(highest, 0.5)) + 1e-6
    apart = hard_neighbours(data, store, count=5, margin=margin)
    assert ((nearest[:, 0] != apart[:, 0]) == (highest > margin)).all()
    assert 0 < (highest > margin).sum() < COUNT
    assert max(matrix[row, near] for row, near in enumerate(apart[:, 0])) <= margin
    twin = int(nearest[3, 0])
    data.keys[twin] = data.keys[3]
    assert hard_neighbours(data, store, count=1, margin=1.0)[3, 0] == nearest[3, 1]


def test_a_second_run_reads_what_the_first_one_found(tmp_path: Path) -> None:
    data, store = examples(tmp_path)
    found = hard_neighbours(data, store, count=3, margin=1.0)
    [path] = tmp_path.glob("neighbours-*.safetensors")
    save_file({"neighbours": found[::-1].copy()}, path)
    assert (hard_neighbours(data, store, count=3, margin=1.0) == found[::-1]).all()


@pytest.mark.parametrize(
    "content",
    [b"", b"damaged", {"other": np.zeros(3, np.int32)}, np.full((COUNT, 3), COUNT), np.zeros((3, 3))],
    ids=str,
)
def test_what_is_damaged_is_found_anew(tmp_path: Path, content: Any) -> None:
    data, store = examples(tmp_path)
    found = hard_neighbours(data, store, count=3, margin=1.0)
    [path] = tmp_path.glob("neighbours-*.safetensors")
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        save_file(content if isinstance(content, dict) else {"neighbours": content.astype(np.int32)}, path)
    assert (hard_neighbours(data, store, count=3, margin=1.0) == found).all()
    assert (load_file(path)["neighbours"] == found).all()


def test_other_texts_teachers_counts_and_margins_have_files_of_their_own(tmp_path: Path) -> None:
    data, store = examples(tmp_path)
    for count, margin in ((3, 1.0), (4, 1.0), (3, 0.9)):
        hard_neighbours(data, store, count=count, margin=margin)
    fewer = Examples(data.texts[:9], data.tokens, data.rows[:9], data.keys[:9])
    assert hard_neighbours(fewer, store, count=3, margin=1.0).shape == (9, 3)
    other = Store(tmp_path, {"weights": "cd" * 32}, WIDTH, store.shards)  # put there in the place of the first
    hard_neighbours(data, other, count=3, margin=1.0)
    assert len([*tmp_path.glob("neighbours-*.safetensors")]) == 5
    Store.open(tmp_path, FINGERPRINT)  # and it is still a store


def test_neighbours_are_written_while_no_writer_may_clear_them_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, store = examples(tmp_path)

    def locked(*written: Any) -> None:
        with pytest.raises(Timeout):
            store.lock(timeout_seconds=0.0).acquire()
        save_file(*written)

    monkeypatch.setattr(mining, "save_file", locked)
    hard_neighbours(data, store, count=3, margin=1.0)
    assert len([*tmp_path.glob("neighbours-*.safetensors")]) == 1


def test_a_store_that_cannot_be_written_to_is_said_and_no_obstacle(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    data, store = examples(tmp_path)
    found = hard_neighbours(data, store, count=3, margin=1.0)
    [path] = tmp_path.glob("neighbours-*.safetensors")
    path.unlink()
    path.mkdir()
    assert (hard_neighbours(data, store, count=3, margin=1.0) == found).all()
    assert "cannot be written" in capsys.readouterr().err


def mined(path: str) -> list[list[int]]:
    """In one of several processes."""
    mining.ROWS = 6
    data, store = examples(Path(path))
    return hard_neighbours(data, store, count=4, margin=0.9).tolist()


@pytest.mark.parametrize("world", [2, 3])
def test_processes_find_together_what_one_finds(tmp_path: Path, world: int) -> None:
    data, store = examples(tmp_path / "store")
    found = processes.run(mined, world, tmp_path, path=tmp_path / "store")
    assert found == [expected(data, store, 4, 0.9)] * world


# The bank of the hard stage

NEAR = np.array([[1, 2, 3], [0, 2, -1], [5, 4, -1], [2, 0, 1], [-1, -1, -1], [4, 3, 2]])


def test_a_hard_bank_is_the_nearest_of_all_texts_first_and_the_window_fills_it() -> None:
    batch, window = np.array([0, 5]), np.array([7, 4, 0, 6, 1])
    assert sampling.hard_bank_rows(batch, NEAR, window).tolist() == [1, 4, 2, 3, 7]
    assert sampling.hard_bank_rows(batch, NEAR, window[:2]).tolist() == [1, 4]
    assert sampling.hard_bank_rows(np.array([4]), NEAR, window).tolist() == window.tolist()


def test_a_hard_bank_holds_no_row_twice_and_no_neighbour_that_is_in_the_batch() -> None:
    for batch in (np.array([0, 1, 3]), np.array([2, 5]), np.arange(6)):
        window = np.array([9, 8, 3, 1, 7, 6])
        bank = sampling.hard_bank_rows(batch, NEAR, window)
        assert len(set(bank.tolist())) == len(bank) == len(window)
        assert set(bank[np.isin(bank, batch)]) <= set(window)
