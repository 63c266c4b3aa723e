"""What distill is measured against computes what distill computes; and times, memory and tables are what they say."""

import json
import os
import signal
import time
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import runs
import torch

from distill.benchmark import encoding, measuring, peers, reading, stepping
from distill.benchmark.arms import ARMS, one_tile, ours, value
from distill.benchmark.cases import Case
from distill.benchmark.measuring import Spread
from distill.benchmark.naive import ALL, NAIVE, ROW_BY_ROW, SAMPLE, WITH_BANK, Batch, exact_gradient, relative_error
from distill.benchmark.seeds import Averaged
from distill.config import StudentConfig, TeacherConfig
from distill.errors import NumericsError
from distill.export import onnx
from distill.metrics import Interval
from distill.similarity import pairwise_cosine
from distill.streaming import engine
from distill.training import TrainConfig

pytestmark = pytest.mark.usefixtures("unchecked")
CPU = torch.device("cpu")
CASES = [(loss, data) for loss in NAIVE for data in ("easy", "hard")]
SLOW_ARMS = ("torch.compile", "liger-kernel", "cut-cross-entropy")


def case(loss: str, data: str = "easy", **changes: object) -> Case:
    rows = {"rank_hinge": 20, "rkd_angle": 24}.get(loss, 40)
    columns = rows + 30 if loss in WITH_BANK else rows
    temperature = 0.05 if data == "easy" else 0.02
    made = Case(
        loss=loss,
        rows=rows,
        columns=columns,
        width=16,
        temperature=temperature,
        dtype="float32",
        data=data,
        repeats=1,
    )
    return replace(made, **changes)


def in_float64(batch: Batch) -> Batch:
    return Batch(batch.student.detach().double().requires_grad_(), batch.columns.double(), batch.temperature)


# What distill is measured against


@pytest.mark.parametrize(("loss", "data"), CASES)
def test_naive_losses_are_those_of_distill(loss: str, data: str) -> None:
    batch = in_float64(case(loss, data).tuned(CPU).batch(CPU))
    assert NAIVE[loss](batch, ALL).item() == pytest.approx(value(loss, batch).item(), rel=1e-5)
    exact = exact_gradient(loss, batch)
    assert exact is not None
    assert relative_error(ours(loss, batch)(), exact) < 1e-5


@pytest.mark.parametrize(
    ("arm", "loss"), [(arm, loss) for arm, (_, has) in ARMS.items() if arm not in SLOW_ARMS for loss in has]
)
def test_every_arm_gives_the_gradient(arm: str, loss: str) -> None:
    if arm == "linear_cross_entropy" and not hasattr(torch.nn.functional, "linear_cross_entropy"):
        pytest.skip("torch.nn.functional.linear_cross_entropy came with torch 2.13")
    batch = case(loss).tuned(CPU).batch(CPU)
    exact = exact_gradient(loss, batch)
    assert exact is not None
    step = ARMS[arm][0](loss, batch)
    for gradient in (step(), step()):  # nothing is left over from the first
        assert gradient.shape == batch.student.shape
        assert relative_error(gradient, exact) < 1e-2
    other = case(loss, noise=1.0).batch(CPU)
    assert relative_error(ARMS[arm][0](loss, other)(), exact) > 0.1


@pytest.mark.slow
def test_a_compiled_loss_gives_the_gradient() -> None:
    batch = case("cross_contrastive").tuned(CPU).batch(CPU)
    exact = exact_gradient("cross_contrastive", batch)
    assert exact is not None
    assert relative_error(ARMS["torch.compile"][0]("cross_contrastive", batch)(), exact) < 1e-2


@pytest.mark.parametrize("loss", ROW_BY_ROW)
def test_the_reference_of_many_rows_is_a_sample(loss: str) -> None:
    rows, columns = 3 * SAMPLE, 3 * SAMPLE + (17 if loss in WITH_BANK else 0)
    batch = in_float64(case(loss, rows=rows, columns=columns, noise=0.3).batch(CPU))
    exact = exact_gradient(loss, batch)
    assert exact is not None
    assert exact[0].tolist() == [*range(SAMPLE // 2), *range(rows - SAMPLE // 2, rows)]
    assert relative_error(ARMS["naive"][0](loss, batch)(), exact) < 1e-9


def test_the_reference_goes_by_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    for loss in ("symmetric", "gram_kl", "similarity_preserving", "rkd_angle", "rank_hinge"):
        batch = case(loss, noise=0.3).batch(CPU)
        monkeypatch.setattr("distill.benchmark.naive.PIECE", 2**30)
        whole = exact_gradient(loss, batch)
        monkeypatch.setattr("distill.benchmark.naive.PIECE", 700)
        pieces = exact_gradient(loss, batch)
        assert whole is not None
        assert pieces is not None
        torch.testing.assert_close(pieces, whole, rtol=1e-9, atol=1e-12)


def test_a_reference_that_would_take_too_long_is_none() -> None:
    assert exact_gradient("rank_hinge", case("rank_hinge", rows=400, columns=400).batch(CPU)) is None


@pytest.mark.parametrize(("loss", "data"), CASES)
def test_rows_have_the_loss_that_their_data_asks_for(loss: str, data: str) -> None:
    found = float(value(loss, case(loss, data, width=128).tuned(CPU).batch(CPU)).detach())
    asked = {"easy": 1e-2 if loss == "rank_hinge" else 1e-4, "hard": 1e-9}[data]
    if (loss, data) == ("rank_hinge", "hard"):
        assert 0 < found < 1e-2
    else:
        assert asked / 3 < found < 3 * asked


def test_one_tile_is_put_back() -> None:
    before = engine.TILE
    with one_tile():
        assert before < engine.TILE
    assert before == engine.TILE


# The pipeline


@pytest.mark.parametrize("way", list(reading.WAYS))
def test_every_way_reads_what_was_written(way: str, tmp_path: Path) -> None:
    vectors = reading.draw(70, 8)
    rows = np.array([69, 0, 3, 3, 42])
    found = reading.WAYS[way](vectors, tmp_path)(rows)
    assert found.dtype == (torch.float16 if "float16" in way else torch.float32)
    assert torch.equal(found.float(), torch.from_numpy(vectors[rows]).float())


@pytest.mark.parametrize("way", [*encoding.RUNTIMES, "sentence-transformers"])
def test_every_way_embeds_as_the_teacher_does(way: str, tiny_bert: Path, tmp_path: Path) -> None:
    if way.startswith(("ONNX", "OpenVINO")) and onnx.absent():
        pytest.skip("the extra onnx is not installed")
    if way.startswith("OpenVINO"):
        pytest.importorskip("openvino", reason="the extra openvino is not installed")
    teacher, texts = runs.teacher(tiny_bert), [*runs.texts(40), "of", runs.texts(3)[0]]
    found = {**encoding.WAYS, **encoding.RUNTIMES}[way](teacher, texts, tmp_path, 8)()
    expected = teacher.encode(texts)
    if "int8" in way or "bf16" in way:
        assert pairwise_cosine(found, expected).min() > (0.9 if "int8" in way else 0.999)
    else:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_an_arm_that_fails_is_left_out_by_name(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lossy(*_: object) -> None:
        raise NumericsError("its vectors are others'; nothing was written.")

    monkeypatch.setitem(encoding.RUNTIMES, "torch.compile", lossy)
    monkeypatch.setattr(encoding, "WAYS", {"distill": encoding.encode})
    (tmp_path / "texts.txt").write_text("\n".join(runs.texts(40)))
    bench = runs.recipe_module("bench_pipeline")
    sizes = {"limit": 8, "batch_size": 8, "static_batch_size": 8, "encoded": 4, "repeats": 1}
    recipe = bench.Recipe(
        data=(str(tmp_path / "texts.txt"),),
        runtimes=("torch.compile",),
        teacher=TeacherConfig(name=str(tiny_bert), max_length=20),
        **sizes,
    )
    given = bench.Given(recipe, tmp_path)
    assert [one.arm for one in bench.embedding(given)] == ["distill"]
    assert list(given.left_out) == ["torch.compile: its vectors are others'"]


def test_a_peer_that_fails_is_left_out_with_the_first_line_of_its_reason(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(work: peers.Work) -> None:
        raise AttributeError("it knows no such model.\nUpgrade it.")

    compare = runs.recipe_module("compare_peers")
    monkeypatch.setitem(peers.PEERS, "broken", broken)
    (tmp_path / "texts.txt").write_text("\n".join(runs.texts(60)))
    recipe = compare.Recipe(
        data=(str(tmp_path / "texts.txt"),),
        held_out=21,
        minutes=0.001,
        seeds=(0,),
        peers=("broken",),
        teacher=TeacherConfig(name=str(tiny_bert)),
        student=StudentConfig(width=8),
        train=TrainConfig(batch_size=8, bank_size=16),
        store=tmp_path / "store",
        output=tmp_path / "compare",
    )
    compare.main(recipe)
    assert "Left out: broken: it knows no such model.\n" in capsys.readouterr().out
    report = json.loads((tmp_path / "compare" / "compare.json").read_text())
    assert report["left_out"] == {"broken": "it knows no such model"}


@pytest.mark.parametrize(
    ("whole", "shown"), [(0.5, "0.250 ±0.000 (50.0%)"), (0.0, "0.250 ±0.000"), (-0.5, "0.250 ±0.000")]
)
def test_of_a_score_that_the_teacher_does_not_have_no_share_is_kept(whole: float, shown: str) -> None:
    score, teacher = (Averaged(Interval(value=one, low=one, high=one), (one,)) for one in (0.25, whole))
    assert runs.recipe_module("compare_peers").cell(score, teacher) == shown


def test_a_trainer_with_our_batches_learns_what_we_learn(tiny_bert: Path, tmp_path: Path) -> None:
    start, examples, store = runs.prepared(tiny_bert, tmp_path / "store", 48)
    start.save_pretrained(tmp_path / "start")
    config = TrainConfig(steps=12, batch_size=16, learning_rate=1e-3, warmup_fraction=0.25)
    job = stepping.Job(
        start=start,
        folder=tmp_path / "start",
        examples=examples,
        store=store,
        config=config,
        warm_up=2,
        output=tmp_path / "runs",
    )
    cosines = {"start": pairwise_cosine(start.encode(examples.texts), job.vectors(np.arange(48))).mean()}
    for arm in (stepping.ours, stepping.in_bf16, stepping.trainer_alike):
        ran = arm(job)
        assert ran.seconds > 0
        assert ran.student is not None
        cosines[arm.__name__] = pairwise_cosine(ran.student.encode(examples.texts), job.vectors(np.arange(48))).mean()
    gained = {name: float(cosine - cosines["start"]) for name, cosine in cosines.items()}
    assert gained["ours"] > 0.02
    assert gained["trainer_alike"] == pytest.approx(gained["ours"], rel=0.15)
    assert gained["in_bf16"] == pytest.approx(gained["ours"], rel=0.02)
    assert gained["in_bf16"] != gained["ours"]


# Measuring


def test_steps_that_fit_are_those_of_a_tenth_of_the_time() -> None:
    made = []

    def probe(steps: int) -> list[float]:
        """A step takes 1 s at first, and 4 s once the machine is warm; the first 5 are slower."""
        made.append(steps)
        return [9.0] * 5 + [1.0] * 20 + [4.0] * (steps - 25)

    slow = (20 * 1.0 + 375 * 4.0) / 395
    assert peers.steps_that_fit(4000.0, probe) == int(4000.0 / slow)
    assert made == [25, 400]
    assert (peers.steps_that_fit(60.0, probe), peers.steps_that_fit(0.1, probe)) == (60, 1)
    assert made == [25, 400, 25, 25]


def test_calls_take_turns() -> None:
    seen: list[str] = []
    calls = {name: lambda name=name: seen.append(name) for name in "abc"}
    times = measuring.in_turns(calls, 4, CPU)
    assert "".join(seen) == "abcbcacababc"
    assert {name: len(values) for name, values in times.items()} == {"a": 4, "b": 4, "c": 4}


def test_turns_give_what_the_calls_give() -> None:
    numbers = iter(range(9))
    found = measuring.turns({"a": lambda: next(numbers), "b": lambda: -next(numbers)}, 2)
    assert found == {"a": [0, 3], "b": [-1, -2]}


def test_milliseconds() -> None:
    assert 20 <= measuring.milliseconds(lambda: time.sleep(0.02), CPU) < 2000


def test_spread_is_median_and_quartiles() -> None:
    assert Spread.of([5.0, 1.0, 4.0, 2.0, 3.0]) == Spread(3.0, 2.0, 4.0)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0)


def who() -> tuple[int, int]:
    return os.getpid(), torch.get_num_threads()


def end() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def complain(about: str) -> None:
    raise ValueError(about)


def test_apart_is_another_process_of_as_many_threads() -> None:
    process, threads = measuring.apart(who)
    assert process != os.getpid()
    assert threads == torch.get_num_threads()
    with pytest.raises(ValueError, match="broken"):
        measuring.apart(complain, "broken")
    with pytest.raises(MemoryError, match="killed"):
        measuring.apart(end)


def extra(megabytes: int, kept: int) -> int | None:
    like = torch.zeros(kept, 2**18)

    def call() -> torch.Tensor:
        for _ in range(2):  # one after the other: the peak is of one
            torch.ones(megabytes, 2**18)
        return torch.ones_like(like)

    return measuring.extra_bytes(call, like)


@pytest.mark.parametrize(("megabytes", "kept"), [(100, 1), (0, 100), (60, 100), (140, 100)])
def test_extra_bytes_are_the_peak_beyond_the_result(megabytes: int, kept: int) -> None:
    found = measuring.apart(extra, megabytes, kept)
    if found is None:
        pytest.skip("peak memory is read from /proc, which this system has not")
    assert found / 2**20 == pytest.approx(max(0, megabytes - kept), abs=6)


def test_a_table() -> None:
    rows = [{"a": "1", "b": ""}, {"a": "2", "b": "x"}]
    assert measuring.markdown(rows) == "| a | b |\n| --- | --- |\n| 1 |  |\n| 2 | x |"


def test_the_machine_names_versions_and_the_date() -> None:
    found = measuring.machine("einops", "no-such-package")
    assert f"torch {metadata.version('torch')}" in found
    assert "einops" in found
    assert "no-such-package" not in found
