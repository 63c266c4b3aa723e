"""The arithmetic of large runs is that of the code: bytes of rows on disk and in memory, and sums that can be done by hand."""

from pathlib import Path

import numpy as np
import pytest

from distill import scaling
from distill.scaling import Cluster, Workload
from distill.store import GOOD, Rows, Store, text_keys


def test_bytes_a_row_are_those_of_a_store(tmp_path: Path) -> None:
    count, width = 5000, 64
    keys = text_keys([str(number) for number in range(count)])
    vectors = np.random.default_rng(0).standard_normal((count, width)).astype(np.float32)
    store = Store.open_or_create(tmp_path, {}, width)
    store.publish(store.append(Rows(vectors, keys, np.ones(count, np.int32), np.full(count, GOOD, np.uint8))))
    store.find(keys[:1])
    assert sum(column.nbytes for column in (store.keys, store.token_counts, store.flags)) == scaling.STORE_ROW * count
    assert store._index is not None
    assert sum(part.nbytes for part in store._index) == scaling.INDEX_ROW * count
    written = sum(path.stat().st_size for path in tmp_path.glob("rows-*"))
    found = scaling.estimate(Workload(texts=float(count), width=width), Cluster(gpus=1, flops=1e12, link=1e9))
    assert found["teacher vectors on disk"] == f"{scaling.size(float(store.row_bytes * count))} in 1 shards"
    assert written == pytest.approx(store.row_bytes * count, rel=0.01)


def test_a_step_by_hand() -> None:
    workload = Workload(texts=1000.0, tokens=10.0, width=4, student_parameters=100.0, batch=8, bank=24)
    parts = scaling.step(workload, Cluster(gpus=4, flops=1000.0, link=100.0))
    assert parts == {"student": 6 * 100 * 10 * 2 / 1000, "loss": 6 * 2 * 32 * 4 / 1000, "gradients": 6.0, "rows": 0.96}
    alone = scaling.step(workload, Cluster(gpus=1, flops=1000.0, link=100.0))
    assert alone["gradients"] == alone["rows"] == 0
    assert alone["student"] == 4 * parts["student"]
    assert scaling.read(workload, Cluster(gpus=4, flops=1.0, link=1.0)) == 26 * 8


def test_units() -> None:
    assert [scaling.size(count) for count in (0.0, 999.0, 1557e9, 2e6)] == ["0 B", "999 B", "1.56 TB", "2 MB"]
    assert [scaling.time(seconds) for seconds in (3.0, 150.0, 7200.0, 2e6)] == [
        "3 s",
        "2.5 minutes",
        "2 hours",
        "23.1 days",
    ]


def test_the_command_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert scaling.main(["--texts", "1e9", "--gpus", "8", "64", "--links", "3e11", "4e10"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "|  | 8 GPUs | 64 GPUs |"
    assert all(line.count("|") == 4 for line in lines)
    assert "1.56 TB in 15,259 shards" in lines[2]
    assert scaling.main(["--store-as", "int8", "--gpus", "1", "--links", "1"]) == 0
    assert "789 GB" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        scaling.main(["--gpus", "8"])
    assert "--links are as many as --gpus: 1, got 2" in capsys.readouterr().err
    for number in ("nan", "inf", "0"):
        with pytest.raises(SystemExit):
            scaling.main(["--texts", number])
        assert "numbers are above 0 and finite" in capsys.readouterr().err


def test_a_format_that_there_is_not_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert scaling.main(["--store-as", "foo"]) == 2
    assert "error: a store keeps vectors as float16, int8" in capsys.readouterr().err


def test_the_readme_shows_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    scaling.main(["--texts", "1e9", "--gpus", "8", "64"])
    page = (Path(scaling.__file__).parents[1] / "recipes" / "README.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out.strip() in page
