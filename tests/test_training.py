"""One loop, the same numbers on any number of processes, and after any stop."""

import json
import math
import os
import signal
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import processes
import pytest
import runs
import torch
from torch import Tensor, nn

from distill import distributed, files, losses
from distill.embed import embed
from distill.encoder import Encoder
from distill.errors import DistillError, IntegrityError, NumericsError, RecipeError, ResourceError, Stopped
from distill.store import Store, compress
from distill.training import Examples, Loss, Run, TrainConfig, checkpoint, loop, match, sampling, train

LONG = {"epochs": 2.0, "save_every": 3, "keep_checkpoints": 20, "dropout": 0.1}  # 10 steps over 40 texts


@pytest.fixture(scope="module")
def model(tiny_bert: Path) -> str:
    return str(tiny_bert)


@pytest.fixture(scope="module")
def store(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("training") / "store"
    embed(runs.texts(60), runs.teacher(model), path)
    return path


def log(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def curve(output: Path) -> list[float]:
    return [entry["loss"] for entry in log(output)]


def checkpointed(output: Path) -> dict[str, dict[str, Tensor]]:
    """Tensors of the newest checkpoint, by file."""
    from safetensors.torch import load_file

    folder = sorted((output / "checkpoints").iterdir())[-1]
    return {path.stem: load_file(path) for path in folder.glob("*.safetensors")}


def assert_same_state(one: Path, other: Path) -> None:
    """Weights, optimizer and random states of the last checkpoints, and the logged losses: not a bit differs."""
    left, right = checkpointed(one), checkpointed(other)
    assert {"model", "optimizer", "rng"} <= left.keys() == right.keys()
    for name, tensors in left.items():
        assert tensors.keys() == right[name].keys()
        for key, value in tensors.items():
            assert torch.equal(value, right[name][key]), f"{name} {key}"
    assert curve(one) == curve(other)


def assert_equal_weights(one: Run, other: Run) -> None:
    found, expected = runs.weights(one), runs.weights(other)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert np.array_equal(value, expected[name]), name


def assert_close_weights(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    """But for key biases: no loss depends on them, so that Adam makes steps of the noise in their gradient."""
    assert one.keys() == other.keys()
    for name in one:
        if not name.endswith("key.bias"):
            np.testing.assert_allclose(one[name], other[name], atol=5e-5, err_msg=name)


# Learning


@pytest.mark.parametrize(("kind", "rate"), [("static", 1e-2), ("layers", 3e-3)])
@pytest.mark.parametrize("loss", ["cosine", "contrastive", "gram", "no bank", "sum"])
def test_the_loss_falls(model: str, store: Path, tmp_path: Path, kind: str, rate: float, loss: str) -> None:
    run = runs.small_run(model, tmp_path, store=store, kind=kind, loss=loss, epochs=8.0, learning_rate=rate)
    losses = curve(tmp_path)
    assert np.mean(losses[-4:]) < 0.8 * np.mean(losses[:4])
    assert run.final_loss == losses[-1]
    assert (run.steps, len(losses)) == (40, 40)
    assert run.texts_per_second == pytest.approx(320 / run.seconds)
    assert not run.student.training


def test_a_trained_student_does_not_drop_out(model: str, store: Path, tmp_path: Path) -> None:
    run = runs.small_run(model, tmp_path, store=store, dropout=0.1, steps=1)
    assert not any(module.training for module in run.student.modules())


def test_padding_is_that_of_the_run_and_not_of_what_was_read_before(model: str, store: Path, tmp_path: Path) -> None:
    found = []
    for before in ([], ["a", "a flute " * 20]):
        student, data, stored = runs.prepared(model, store, 40)
        if before:
            student(student.tokenize(before).tokens)
        run = train(student, data, stored, losses.GramMSE(), TrainConfig(batch_size=8), output=tmp_path)
        found.append((run.padding, [entry["padding"] for entry in log(tmp_path)]))
    assert found[0] == found[1]
    assert found[0][0] == pytest.approx(np.mean(found[0][1]), abs=0.05)


def test_the_log_is_on_the_disk_when_a_checkpoint_stands(
    model: str, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: dict[int, int] = {}
    fsync = os.fsync

    def noted(file: int) -> None:
        fsync(file)
        found = os.fstat(file)
        if found.st_ino == (tmp_path / "checkpoints").stat().st_ino:  # which names the new checkpoint
            said = (tmp_path / "metrics.jsonl").stat()
            assert flushed[said.st_ino] == said.st_size
        flushed[found.st_ino] = found.st_size

    (tmp_path / "checkpoints").mkdir()
    monkeypatch.setattr(os, "fsync", noted)
    runs.small_run(model, tmp_path, store=store, kind="static", save_every=2)
    assert (tmp_path / "checkpoints").stat().st_ino in flushed


def test_what_is_logged(model: str, store: Path, tmp_path: Path) -> None:
    runs.small_run(model, tmp_path, store=store, loss="sum", epochs=1.5, batch_size=16)
    entries = log(tmp_path)
    assert [entry["texts"] for entry in entries] == [16, 16, 8, 16]
    assert [entry["step"] for entry in entries] == [1, 2, 3, 4]
    for entry in entries:
        assert {"step", "loss", "lr", "grad_norm", "texts", "seconds", "loss/gram"} <= entry.keys()
    assert "loss/kl" not in entries[-1]


@pytest.mark.parametrize("count", [1, 3, 8, 9])
def test_any_number_of_texts_is_trained_on_once_an_epoch(model: str, store: Path, tmp_path: Path, count: int) -> None:
    seen: list[int] = []

    class Recording(losses.CrossContrastive):
        def forward(self, student: Tensor, teacher: Tensor, *, keys: Tensor, **options: Any) -> Tensor:
            seen.extend(keys.tolist())
            return super().forward(student, teacher, keys=keys, **options)

    student, examples, stored = runs.prepared(model, store, count, "static")
    config = TrainConfig(batch_size=8, epochs=3.0)
    run = train(student, examples, stored, Recording(), config, output=tmp_path)
    assert run.steps == 3 * -(-count // 8)
    assert set(Counter(seen).values()) == {3}
    assert len(set(seen)) == count


@pytest.mark.parametrize(("epochs", "steps"), [(0.05, 1), (0.75, 4), (1.5, 8)])
def test_a_part_of_an_epoch_is_rounded_to_whole_steps(
    model: str, store: Path, tmp_path: Path, epochs: float, steps: int
) -> None:
    assert runs.small_run(model, tmp_path, store=store, kind="static", epochs=epochs).steps == steps


def test_the_schedule(model: str, store: Path, tmp_path: Path) -> None:
    for schedule, last in (("cosine", 0.0), ("linear", 0.0), ("constant", 1e-3)):
        options: dict[str, Any] = {"schedule": schedule, "steps": 20, "warmup_fraction": 0.25}
        runs.small_run(model, tmp_path, store=store, kind="static", **options)
        rates = [entry["lr"] for entry in log(tmp_path)]
        assert rates[:5] == pytest.approx([1e-4, 3e-4, 5e-4, 7e-4, 9e-4])
        assert rates[-1] == pytest.approx(last, abs=5e-5)
        assert all(first >= second for first, second in pairwise(rates[5:]))


@pytest.mark.parametrize("update", ["dense", "rows"])
def test_a_run_whose_time_is_up_is_one_of_fewer_steps(model: str, store: Path, tmp_path: Path, update: str) -> None:
    common: dict[str, Any] = {"store": store, "kind": "static", "table_update": update, "ema_decay": 0.5}
    common |= {"schedule": "constant", "warmup_fraction": 0.0}
    short = runs.small_run(model, tmp_path / "short", steps=7, seconds=0.0, save_every=5, **common)
    assert (tmp_path / "short" / "checkpoints" / "step-00000001").is_dir()
    alone = runs.small_run(model, tmp_path / "alone", steps=1, **common)
    assert (short.steps, len(curve(tmp_path / "short"))) == (1, 1)
    assert_equal_weights(short, alone)
    resumed = runs.small_run(model, tmp_path / "short", steps=7, resume=True, **common)
    whole = runs.small_run(model, tmp_path / "whole", steps=7, seconds=1e9, **common)
    assert (resumed.steps, whole.steps) == (7, 7)
    assert_equal_weights(resumed, whole)


def test_accumulated_batches_give_the_gradient_of_their_rows(model: str, store: Path, tmp_path: Path) -> None:
    """A loss that is a mean over rows: 2 batches of 8, or 3 of which the last is smaller, are one batch of all of them."""
    for count, size, accumulation in ((16, 8, 2), (40, 16, 3)):
        whole = {"count": count, "loss": "cosine", "steps": 3, "clip_norm": 0.0}
        one = runs.small_run(model, tmp_path / "one", store=store, batch_size=size * accumulation, **whole)
        many = runs.small_run(
            model, tmp_path / "many", store=store, batch_size=size, accumulation=accumulation, **whole
        )
        np.testing.assert_allclose(curve(tmp_path / "one"), curve(tmp_path / "many"), rtol=1e-5)
        assert_close_weights(runs.weights(one), runs.weights(many))


def test_the_launchers_accumulation_does_not_shrink_the_gradient(
    model: str, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs.small_run(model, tmp_path / "a", store=store, steps=2)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    runs.small_run(model, tmp_path / "b", store=store, steps=2)
    assert [entry["grad_norm"] for entry in log(tmp_path / "a")] == [
        entry["grad_norm"] for entry in log(tmp_path / "b")
    ]


def test_frozen_tables_stay_and_are_not_in_the_checkpoint(model: str, store: Path, tmp_path: Path) -> None:
    from distill.students import freeze_token_table

    student, data, stored = runs.prepared(model, store, 40)
    freeze_token_table(student)
    table = student.backbone.model.get_input_embeddings().weight
    before = table.detach().clone()
    train(student, data, stored, losses.CosineDistance(), TrainConfig(batch_size=8), output=tmp_path)
    assert torch.equal(table.cpu(), before)
    assert not any("word_embeddings" in name for name in checkpointed(tmp_path)["optimizer"])
    again = runs.prepared(model, store, 40)[0]
    config = TrainConfig(batch_size=8, resume=True)
    with pytest.raises(IntegrityError, match="what differs: student"):
        train(again, data, stored, losses.CosineDistance(), config, output=tmp_path)


def test_bf16_leaves_a_float32_student_and_a_second_run_may_differ(model: str, store: Path, tmp_path: Path) -> None:
    curves = {}
    for precision in ("no", "bf16", "no"):
        run = runs.small_run(model, tmp_path, store=store, mixed_precision=precision, epochs=2.0)
        assert {value.dtype for value in run.student.parameters()} == {torch.float32}
        assert run.student.encode(["a flute"]).dtype == torch.float32
        assert "forward" not in vars(run.student)
        curves.setdefault(precision, []).append(curve(tmp_path))
    assert curves["no"][0] == curves["no"][1] != curves["bf16"][0]
    np.testing.assert_allclose(curves["no"][0], curves["bf16"][0], rtol=0.05)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_student_may_be_trained_again_in_the_same_precision(
    model: str, store: Path, tmp_path: Path, precision: str
) -> None:
    student, data, stored = runs.prepared(model, store, 40, "layers")
    before = {name: value.clone() for name, value in student.state_dict().items()}
    config = TrainConfig(batch_size=8, mixed_precision=precision)
    for number in ("first", "second"):
        student.load_state_dict(before)
        train(student, data, stored, losses.GramMSE(), config, output=tmp_path / number)
    assert curve(tmp_path / "first") == curve(tmp_path / "second")


def test_a_student_that_the_caller_has_prepared_trains_as_asked_and_stays_prepared(
    model: str, store: Path, tmp_path: Path
) -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    runs.small_run(model, tmp_path / "plain", store=store)
    student, data, stored = runs.prepared(model, store, 40, "layers")
    try:
        prepared = Accelerator(mixed_precision="bf16", cpu=True).prepare(student)
        forward = vars(prepared)["forward"]
        config = TrainConfig(batch_size=8, dropout=False)
        run = train(student, data, stored, runs.LOSSES["contrastive"](), config, output=tmp_path / "own")
        assert run.student is prepared
        assert vars(prepared)["forward"] is forward
        assert prepared._is_accelerate_prepared
    finally:
        AcceleratorState._reset_state()
    assert curve(tmp_path / "own") == curve(tmp_path / "plain")


def test_accelerate_is_used_as_the_recipe_says_and_left_as_it_was(model: str, store: Path, tmp_path: Path) -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    own = Accelerator(gradient_accumulation_steps=4, mixed_precision="bf16", cpu=True)
    own.gradient_state._set_sync_gradients(False)  # as a loop that ends between two batches leaves it
    try:
        run = runs.small_run(model, tmp_path, store=store, kind="static")
        fresh, *_ = runs.prepared(model, store, 40, "static")
        assert not torch.equal(run.student.backbone.table.cpu(), fresh.backbone.table)
        assert (own.gradient_accumulation_steps, own.sync_gradients, own.mixed_precision) == (4, False, "bf16")
    finally:
        AcceleratorState._reset_state()
        GradientState._reset_state()


def test_a_launchers_sharded_training_is_refused(
    model: str, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate import Accelerator, DistributedType

    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.FSDP)
    with pytest.raises(RecipeError, match=r"the launcher asks for FSDP; .* Launch with --multi_gpu"):
        runs.small_run(model, tmp_path, store=store, kind="static")


def test_what_is_refused_leaves_the_student_as_it_was(model: str, store: Path, tmp_path: Path) -> None:
    student, data, stored = runs.prepared(model, store, 40, "static")
    refused = TrainConfig(batch_size=8, table_update="rows", bank_size=8, hard_stage=0.5)
    with pytest.raises(RecipeError, match="hard-stage"):
        train(student, data, stored, losses.CosineDistance(), refused, output=tmp_path)
    assert all(parameter.requires_grad for parameter in student.parameters())
    transformer, data, stored = runs.prepared(model, store, 40, "layers")
    refused = TrainConfig(batch_size=8, mixed_precision="bf16", start_decay=1.0)
    with pytest.raises(RecipeError, match="start-decay"):
        train(transformer, data, stored, losses.CosineDistance(), refused, output=tmp_path)
    assert "forward" not in vars(transformer)


def test_the_terms_that_are_logged_add_up_to_the_loss_of_all_batches(model: str, store: Path, tmp_path: Path) -> None:
    student, data, stored = runs.prepared(model, store, 38, "static")
    loss = losses.WeightedSum({"kl": losses.CrossKL(), "near": losses.CosineDistance()}, {"kl": 2.0, "near": 0.5})
    config = TrainConfig(batch_size=8, accumulation=3, epochs=2.0)
    train(student, data, stored, loss, config, output=tmp_path)
    for entry in log(tmp_path):
        assert entry["loss"] == pytest.approx(2.0 * entry["loss/kl"] + 0.5 * entry["loss/near"], rel=1e-5)


def test_vectors_that_were_set_aside_are_not_trained_on(model: str, tmp_path: Path) -> None:
    teacher, texts = runs.teacher(model), ["", *runs.texts(20)]
    stored = embed(texts, teacher, tmp_path / "store")
    student = runs.student("static", teacher)
    data = match(texts, student, teacher, stored)
    assert data.texts == runs.texts(20)
    assert "1 left out: teacher vector no tokens" in data.report
    train(student, data, stored, losses.CosineDistance(), TrainConfig(batch_size=8), output=tmp_path / "run")


def test_what_each_side_cuts_is_reported(model: str, tmp_path: Path) -> None:
    """A store does not keep whether there was more: a text that fills the teacher's limit counts as one that it may have cut."""
    teacher = Encoder.from_pretrained(model, max_length=8)
    student, texts = runs.student("static", teacher), ["the", "the " * 6, "the " * 7]
    student.max_length = 6
    data = match(texts, student, teacher, embed(texts, teacher, tmp_path))
    assert data.report == "3 texts, 33.3% cut by the student, 66.7% reach the teacher's limit"


def test_each_side_reads_texts_with_its_own_prompt(model: str, store: Path) -> None:
    teacher, texts = runs.teacher(model), runs.texts(20)
    student = runs.student("static", teacher)
    student.prompts = {"query": "the "}
    data = match({"query": texts}, student, teacher, Store.open(store))
    assert torch.equal(data.tokens.ids, student.tokenize(texts, prompt="the ").tokens.ids)


# Micro-batches


@pytest.mark.parametrize(
    "options",
    [
        {"loss": "sum", "bank_size": 16},
        {"loss": "contrastive", "accumulation": 3},
        {"loss": "gram", "mixed_precision": "bf16"},
        {"loss": "gram", "kind": "static"},
    ],
    ids=str,
)
def test_micro_batches_change_nothing(model: str, store: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    whole = runs.small_run(model, tmp_path / "whole", store=store, epochs=2.0, **options)
    many = runs.small_run(model, tmp_path / "many", store=store, epochs=2.0, micro_batch=3, **options)
    if options.get("mixed_precision") == "bf16":
        np.testing.assert_allclose(curve(tmp_path / "whole"), curve(tmp_path / "many"), rtol=0.01)
        return
    assert_close_weights(runs.weights(whole), runs.weights(many))
    for one, other in zip(log(tmp_path / "whole"), log(tmp_path / "many"), strict=True):
        assert one.keys() == other.keys()
        for name in one.keys() - {"seconds", "padding"}:
            same = other[name] if isinstance(other[name], str) else pytest.approx(other[name], rel=1e-5, abs=1e-6)
            assert one[name] == same, name


def test_micro_batches_leave_the_random_state_where_it_would_be(model: str, store: Path, tmp_path: Path) -> None:
    for size in (3, 8):
        runs.small_run(model, tmp_path / str(size), store=store, micro_batch=size, **LONG)
    states = [checkpointed(tmp_path / str(size))["rng"]["0.cpu"] for size in (3, 8)]
    assert torch.equal(*states)
    assert curve(tmp_path / "3") != curve(tmp_path / "8")  # the masks of dropout are others


def test_a_run_goes_on_with_another_micro_batch(model: str, store: Path, tmp_path: Path) -> None:
    options = {**LONG, "dropout": 0.0, "loss": "sum"}
    runs.small_run(model, tmp_path / "whole", store=store, **options)
    cut_behind(tmp_path / "whole", tmp_path / "run", 3)
    runs.small_run(model, tmp_path / "run", store=store, resume=True, micro_batch=3, **options)
    np.testing.assert_allclose(curve(tmp_path / "whole"), curve(tmp_path / "run"), rtol=1e-5)
    assert curve(tmp_path / "whole")[:3] == curve(tmp_path / "run")[:3]


@pytest.mark.parametrize("micro_batch", [None, 6])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_run_that_runs_out_of_memory_is_one_with_a_smaller_micro_batch(
    model: str,
    store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    micro_batch: int | None,
    accumulation: int,
) -> None:
    options = {**LONG, "accumulation": accumulation, "loss": "sum", "save_every": 1}
    runs.small_run(model, tmp_path / "small", store=store, micro_batch=2 if micro_batch is None else 3, **options)
    assert "memory" not in capsys.readouterr().err
    forward = Encoder.forward

    def short_of_memory(self: Encoder, tokens: Any) -> Tensor:
        vectors = forward(self, tokens)
        if torch.is_grad_enabled() and len(tokens) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return vectors

    monkeypatch.setattr(Encoder, "forward", short_of_memory)
    runs.small_run(model, tmp_path / "run", store=store, micro_batch=micro_batch, **options)
    assert_same_state(tmp_path / "run", tmp_path / "small")
    assert capsys.readouterr().err.count("out of memory with") == (2 if micro_batch is None else 1)
    monkeypatch.undo()  # its size stays what memory was enough for: the masks of dropout follow it
    cut_behind(tmp_path / "run", tmp_path / "resumed", 3)
    runs.small_run(model, tmp_path / "resumed", store=store, micro_batch=micro_batch, resume=True, **options)
    assert_same_state(tmp_path / "resumed", tmp_path / "small")


def test_a_text_that_does_not_fit_ends_the_run_with_a_way_out(
    model: str, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(self: Encoder, tokens: Any) -> Tensor:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")

    student, data, stored = runs.prepared(model, store, 20, "static")
    monkeypatch.setattr(Encoder, "forward", no_memory)
    with pytest.raises(ResourceError, match="one text alone does not fit in memory") as caught:
        train(student, data, stored, losses.CosineDistance(), TrainConfig(batch_size=4), output=tmp_path)
    assert caught.value.exit_code == 6


# The bank


def test_a_window_of_the_bank_holds_no_row_twice_and_all_rows_come() -> None:
    for count, size in ((40, 16), (40, 40), (7, 100), (5, 1)):
        windows = [
            sampling.bank_rows(draw, count, size=size, seed=3) for draw in range(2 * (count // min(size, count)))
        ]
        assert all(len(set(window)) == len(window) == min(size, count) for window in windows)
        first = np.concatenate(windows[: len(windows) // 2])
        assert len(set(first)) == len(first)
        assert all(
            (sampling.bank_rows(draw, count, size=size, seed=3) == window).all() for draw, window in enumerate(windows)
        )
    assert (sampling.bank_rows(0, 40, size=40, seed=3) != sampling.bank_rows(0, 40, size=40, seed=4)).any()


def test_a_bank_comes_in_the_order_of_no_seeds_texts() -> None:
    banks = [sampling.bank_rows(0, 40, size=40, seed=seed).tolist() for seed in range(8)]
    orders = [sampling.permutation(seed, epoch, 40).tolist() for seed in range(9) for epoch in range(3)]
    assert not [bank for bank in banks if bank in orders]
    as_ever = np.random.Generator(np.random.PCG64([1, 0])).permutation(40)
    assert (sampling.permutation(1, 0, 40) == as_ever).all(), "texts come in the order of the runs there are"


def test_an_epoch_is_a_permutation_and_a_seed_another() -> None:
    options = {"batch_size": 4, "accumulation": 2, "seed": 0}
    per_epoch = sampling.steps_per_epoch(19, 4, 2)
    steps = [sampling.batches(step, 19, **options) for step in range(2 * per_epoch)]
    assert [[len(batch) for batch in step] for step in steps[:per_epoch]] == [[4, 4], [4, 4], [3]]
    first = np.concatenate([batch for step in steps[:per_epoch] for batch in step])
    second = np.concatenate([batch for step in steps[per_epoch:] for batch in step])
    assert sorted(first) == sorted(second) == [*range(19)]
    assert (first != second).any()
    assert (sampling.batches(0, 19, **{**options, "seed": 1})[0] != first[:4]).any()


class Watching(nn.Module):
    """A cross loss that keeps what it was given."""

    uses_bank = True

    def __init__(self) -> None:
        super().__init__()
        self.given: list[dict[str, Any]] = []

    def forward(self, student: Tensor, teacher: Tensor, **columns: Any) -> Tensor:
        given = {"teacher": teacher, **columns}
        self.given.append({name: part.cpu() if isinstance(part, Tensor) else part for name, part in given.items()})
        return losses.cross_contrastive(student, teacher, **columns)


def test_the_bank_is_drawn_from_the_store_with_keys(model: str, store: Path, tmp_path: Path) -> None:
    loss = Watching()
    student, data, stored = runs.prepared(model, store, 40, "static")
    train(student, data, stored, loss, TrainConfig(batch_size=8, bank_size=16), output=tmp_path)
    for given in loss.given:
        rows = [data.keys.tolist().index(key) for key in given["bank_keys"].tolist()]
        assert len(set(rows)) == 16
        assert torch.equal(given["bank"], stored.take(data.rows[rows]))
        mine = [data.keys.tolist().index(key) for key in given["keys"].tolist()]
        assert torch.equal(given["teacher"], stored.take(data.rows[mine]))
    drawn = torch.cat([given["bank_keys"] for given in loss.given[:2]])
    assert len(drawn.unique()) == 32


def test_every_batch_of_every_seed_has_a_bank_of_its_own(model: str, store: Path, tmp_path: Path) -> None:
    student, data, stored = runs.prepared(model, store, 40, "static")
    drawn = []
    for seed in (0, 1):
        loss, config = Watching(), TrainConfig(batch_size=8, accumulation=2, bank_size=16, seed=seed)
        train(student, data, stored, loss, config, output=tmp_path)
        drawn += [tuple(given["bank_keys"].tolist()) for given in loss.given]
    assert len(set(drawn)) == len(drawn) == 2 * 5


def test_a_text_is_no_negative_of_itself(model: str, store: Path, tmp_path: Path) -> None:
    """The bank row is the text itself here: it is masked, as if there were none."""
    runs.small_run(model, tmp_path / "same", store=store, count=1, bank_size=1, epochs=3.0)
    assert curve(tmp_path / "same") == [0.0, 0.0, 0.0]
    runs.small_run(model, tmp_path / "more", store=store, count=40, bank_size=16, steps=1)
    runs.small_run(model, tmp_path / "less", store=store, count=40, bank_size=0, steps=1)
    assert curve(tmp_path / "more")[0] > 1.01 * curve(tmp_path / "less")[0]


# Refusals


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"batch_size": 0}, "batch_size is above 0, got 0"),
        ({"epochs": -1.0}, "epochs is above 0"),
        ({"epochs": math.nan}, "epochs is above 0"),
        ({"steps": 0}, "steps is above 0"),
        ({"accumulation": 0}, "accumulation is above 0"),
        ({"micro_batch": 0}, "micro_batch is above 0, got 0"),
        ({"learning_rate": 0.0}, "learning_rate is above 0"),
        ({"learning_rate": math.inf}, "learning_rate is finite, got inf"),
        ({"clip_norm": -1.0}, "clip_norm is 0 or more"),
        ({"save_every": 0}, "save_every is above 0"),
        ({"keep_checkpoints": 0}, "keep_checkpoints is above 0"),
        ({"weight_decay": -0.1}, "weight_decay is 0 or more"),
        ({"weight_decay": math.nan}, "weight_decay is 0 or more"),
        ({"bank_size": -1}, "bank_size is 0 or more"),
        ({"seed": -1}, "seed is 0 or more"),
        ({"warmup_fraction": 1.5}, r"warmup_fraction is 0\.\.1"),
        ({"warmup_fraction": math.nan}, r"warmup_fraction is 0\.\.1"),
        ({"batch_size": 0, "seed": -1}, "batch_size.*; seed"),
        ({"projection_rate": 0.0}, "projection_rate is above 0"),
        ({"token_weight_rate": -1.0}, "token_weight_rate is above 0"),
        ({"table_rate": math.inf}, "table_rate is finite, got inf"),
        ({"layer_decay": 1.1}, "layer_decay is above 0, up to 1, got 1.1"),
        ({"start_decay": 0.0}, "start_decay is above 0"),
        ({"ema_decay": 1.0}, "ema_decay is 0 or more, below 1, got 1.0"),
        ({"ema_decay": math.nan}, "ema_decay is 0 or more, below 1"),
        ({"hard_stage": 0.0, "bank_size": 8}, "hard_stage is above 0, up to 1"),
        ({"hard_stage": 0.1}, "hard_stage fills the bank with neighbours: give bank_size"),
        ({"hard_neighbours": 0}, "hard_neighbours is above 0"),
        ({"hard_margin": 1.5}, "hard_margin is above 0, up to 1"),
    ],
    ids=str,
)
def test_a_recipe_that_cannot_run_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        TrainConfig(**wrong)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"table_update": "row"}, "table_update is 'dense' or 'rows', got 'row'"),
        ({"schedule": "cosin"}, "schedule is 'cosine' or 'linear' or 'constant', got 'cosin'"),
        ({"mixed_precision": "fp16"}, "mixed_precision is 'no' or 'bf16'"),
        ({"trackers": "wandb"}, "trackers are names in a tuple, got 'wandb'"),
    ],
    ids=str,
)
def test_a_choice_that_there_is_not_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        TrainConfig(**wrong)


def test_a_tracker_that_is_not_there_is_refused(model: str, store: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no-such-thing: not an installed tracker"):
        runs.small_run(model, tmp_path, store=store, trackers=("no-such-thing",))


@pytest.mark.parametrize(
    ("tracker", "kept"),
    [
        ("tensorboard", "**/events.out.tfevents*"),
        ("trackio", "trackio/distill.db"),
        ("wandb", "wandb/offline-run-*/*.wandb"),
    ],
)
def test_each_tracker_starts_without_a_network(
    model: str, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tracker: str, kept: str
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read as trackio is imported
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    pytest.importorskip(tracker)
    runs.small_run(model, tmp_path, store=store, kind="static", trackers=(tracker,))
    assert [*tmp_path.glob(kept)]


def test_a_tracker_that_does_not_start_is_one_message(
    model: str, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "distill").write_text("a file where tensorboard wants a folder")
    pytest.importorskip("tensorboard")
    with pytest.raises(ResourceError, match=r"tensorboard could not be started .*leave out --train\.trackers"):
        runs.small_run(model, tmp_path, store=store, kind="static", trackers=("tensorboard",))


def test_an_output_that_is_a_file_is_an_environment_error(model: str, store: Path, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(ResourceError, match="cannot be written"):
        runs.small_run(model, tmp_path / "run", store=store, kind="static")


def poisoned(student: Encoder, data: Examples, row: int) -> None:
    """Give `row` a token that no other text has, and that token a NaN vector."""
    student.backbone.table.data[data.tokens.ids[data.tokens.lengths[:row].sum()]] = float("nan")


def unique_word(model: str, path: Path) -> tuple[Encoder, Examples, Store]:
    teacher, texts = runs.teacher(model), [*runs.texts(20), "x x x"]
    stored = embed(texts, teacher, path)
    student = runs.student("static", teacher)
    data = match(texts, student, teacher, stored)
    poisoned(student, data, 20)
    return student, data, stored


@pytest.mark.parametrize("micro_batch", [None, 3])
def test_a_loss_that_is_not_finite_stops_before_the_update(model: str, tmp_path: Path, micro_batch: int | None) -> None:
    student, data, stored = unique_word(model, tmp_path / "store")
    before: list[dict[str, Tensor]] = []

    def remember(*arguments: Tensor) -> Tensor:
        before.append({name: value.clone() for name, value in student.state_dict().items()})
        return losses.cosine_distance(*arguments)

    with pytest.raises(NumericsError, match=r"step \d+: loss nan.*1 rows have") as caught:
        train(student, data, stored, remember, TrainConfig(batch_size=4, micro_batch=micro_batch), output=tmp_path)
    report = json.loads((tmp_path / "non-finite.json").read_text())
    assert [row["text"] for row in report["rows"]] == ["x x x"]
    assert report["step"] == len(before)
    assert caught.value.exit_code == 5
    for name, value in student.state_dict().items():
        assert torch.equal(value.nan_to_num(), before[-1][name].nan_to_num())
    assert len(log(tmp_path)) == len(before) - 1


def test_a_gradient_that_is_not_finite_stops_too(model: str, store: Path, tmp_path: Path) -> None:
    def steep(student: Tensor, teacher: Tensor) -> Tensor:
        return (student - student.detach()).abs().sum().sqrt()  # 0, with an infinite slope

    student, data, stored = runs.prepared(model, store, 20, "static")
    with pytest.raises(NumericsError, match=r"step 1: loss 0\.0, gradient norm nan.*No rows"):
        train(student, data, stored, steep, TrainConfig(batch_size=4), output=tmp_path)
    assert len(json.loads((tmp_path / "non-finite.json").read_text())["rows"]) == 4


# Resume


@pytest.fixture(scope="module")
def uninterrupted(model: str, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("uninterrupted")
    runs.small_run(model, output, store=store, bank_size=16, **LONG)
    return output


def cut_behind(source: Path, target: Path, step: int) -> None:
    """The run as it was when it had saved `step`: later checkpoints gone, the log a little further."""
    import shutil

    shutil.copytree(source, target)
    for folder in (target / "checkpoints").iterdir():
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)
    lines = (target / "metrics.jsonl").read_text().splitlines(keepends=True)
    (target / "metrics.jsonl").write_text("".join(lines[: step + 2]) + '{"step": 9')


@pytest.mark.parametrize("step", [3, 6, 9])
def test_a_resumed_run_differs_in_no_bit(
    model: str, store: Path, uninterrupted: Path, tmp_path: Path, step: int
) -> None:
    cut_behind(uninterrupted, tmp_path / "run", step)
    torch.randn(7)  # whatever happened before in this process
    runs.small_run(model, tmp_path / "run", store=store, bank_size=16, resume=True, **LONG)
    assert_same_state(tmp_path / "run", uninterrupted)


def test_a_run_resumed_twice_differs_in_no_bit(model: str, store: Path, uninterrupted: Path, tmp_path: Path) -> None:
    for step in (3, 6):
        cut_behind(uninterrupted if step == 3 else tmp_path / "3", tmp_path / str(step), step)
        runs.small_run(model, tmp_path / str(step), store=store, bank_size=16, resume=True, **LONG)
    assert_same_state(tmp_path / "6", uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["sum", "gram"])
def test_every_step_of_forty_can_be_resumed(model: str, store: Path, tmp_path: Path, loss: str) -> None:
    options = {**LONG, "epochs": 8.0, "save_every": 1, "keep_checkpoints": 50, "loss": loss}
    runs.small_run(model, tmp_path / "whole", store=store, **options)
    for step in range(1, 40):
        cut_behind(tmp_path / "whole", tmp_path / str(step), step)
        runs.small_run(model, tmp_path / str(step), store=store, resume=True, **options)
        assert_same_state(tmp_path / str(step), tmp_path / "whole")


def test_a_finished_run_resumed_is_that_run(model: str, store: Path, uninterrupted: Path, tmp_path: Path) -> None:
    cut_behind(uninterrupted, tmp_path / "run", 10)
    run = runs.small_run(model, tmp_path / "run", store=store, bank_size=16, resume=True, **LONG)
    assert run.final_loss == curve(uninterrupted)[-1]
    assert_same_state(tmp_path / "run", uninterrupted)


def test_a_resumed_run_keeps_as_many_checkpoints_as_are_asked_for_now(
    model: str, store: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    cut_behind(uninterrupted, tmp_path / "run", 10)
    fewer = LONG | {"keep_checkpoints": 1}
    runs.small_run(model, tmp_path / "run", store=store, bank_size=16, resume=True, **fewer)
    assert [item.name for item in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000010"]


def test_the_time_of_a_run_is_that_of_all_its_parts(model: str, store: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"store": store, "steps": 10, "save_every": 5}
    whole = runs.small_run(model, tmp_path / "run", **options)
    cut_behind(tmp_path / "run", tmp_path / "cut", 5)
    state = json.loads((tmp_path / "cut/checkpoints/step-00000005/state.json").read_text())
    assert 0 < state["spent"]["seconds"] < whole.seconds
    again = runs.small_run(model, tmp_path / "cut", **options, resume=True)
    assert again.seconds > state["spent"]["seconds"]
    assert again.texts_per_second * again.seconds == pytest.approx(whole.texts_per_second * whole.seconds) == 80


def test_resume_without_a_checkpoint_begins(model: str, store: Path, tmp_path: Path) -> None:
    runs.small_run(model, tmp_path, store=store, resume=True)
    assert len(log(tmp_path)) == 5


def test_a_new_run_clears_the_checkpoints_of_the_one_before(model: str, store: Path, tmp_path: Path) -> None:
    runs.small_run(model, tmp_path, store=store, steps=9, keep_checkpoints=3)
    assert [item.name for item in sorted((tmp_path / "checkpoints").iterdir())] == [
        f"step-{step:08d}" for step in (7, 8, 9)
    ]
    runs.small_run(model, tmp_path, store=store, steps=2, keep_checkpoints=1, save_every=1)
    assert [item.name for item in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]
    assert len(log(tmp_path)) == 2


def test_a_damaged_newest_checkpoint_is_passed_over(
    model: str, store: Path, uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    cut_behind(uninterrupted, tmp_path / "run", 9)
    (tmp_path / "run" / "checkpoints" / "step-00000009" / "model.safetensors").write_bytes(b"")
    runs.small_run(model, tmp_path / "run", store=store, bank_size=16, resume=True, **LONG)
    assert "step-00000009: model.safetensors differ" in capsys.readouterr().err
    assert_same_state(tmp_path / "run", uninterrupted)
    for folder in (tmp_path / "run" / "checkpoints").iterdir():
        (folder / "state.json").unlink()
    with pytest.raises(IntegrityError, match="no checkpoint is whole"):
        runs.small_run(model, tmp_path / "run", store=store, bank_size=16, resume=True, **LONG)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"learning_rate": 1e-4}, r"learning_rate \(was 0.001, is 0.0001\)"),
        ({"batch_size": 4}, r"steps \(was 10, is 20\), batch_size \(was 8, is 4\)"),
        ({"loss": "gram"}, r"loss \(was CrossContrastive"),
        ({"count": 39}, "texts"),
        ({"kind": "static"}, "student"),
        ({"seed": 1}, "seed"),
        ({"bank_size": 0}, "bank_size"),
        ({"ema_decay": 0.9}, r"ema_decay \(was None, is 0.9\)"),
        ({"projection_rate": 0.5}, r"projection_rate \(was None, is 0.5\)"),
        ({"hard_stage": 0.5}, r"hard_stage \(was None, is 0.5\)"),
    ],
    ids=str,
)
def test_another_recipe_does_not_resume(
    model: str, store: Path, uninterrupted: Path, change: dict[str, Any], field: str
) -> None:
    options = {"bank_size": 16, **LONG, **change}
    with pytest.raises(IntegrityError, match=f"belongs to another run; what differs: {field}"):
        runs.small_run(model, uninterrupted, store=store, resume=True, **options)
    assert len(log(uninterrupted)) == 10


def test_another_teacher_does_not_resume(tiny_mpnet: Path, model: str, store: Path, tmp_path: Path) -> None:
    student, data, stored = runs.prepared(model, store, 20, "static")
    config = TrainConfig(batch_size=8, resume=True)
    train(student, data, stored, losses.CosineDistance(), config, output=tmp_path / "run")
    other = runs.teacher(tiny_mpnet)
    elsewhere = embed(runs.texts(20), other, tmp_path / "store")
    with pytest.raises(IntegrityError, match="what differs: teacher"):
        train(
            student,
            match(runs.texts(20), student, other, elsewhere),
            elsewhere,
            losses.CosineDistance(),
            config,
            output=tmp_path / "run",
        )


@pytest.mark.parametrize("bank_size", [0, 16])
def test_a_run_that_drew_its_banks_otherwise_does_not_resume(
    model: str, store: Path, tmp_path: Path, bank_size: int
) -> None:
    """As it was before banks had an order of their own and time was kept. A run without a bank goes on."""
    runs.small_run(model, tmp_path / "run", store=store, bank_size=bank_size, **LONG)
    newest = tmp_path / "run" / "checkpoints" / "step-00000010"
    state, hashes = (json.loads((newest / name).read_text()) for name in ("state.json", "manifest.json"))
    assert (state["identity"].pop("bank_order", None) is not None) == bool(bank_size)
    del state["spent"]
    (newest / "state.json").write_text(json.dumps(state))
    hashes["state.json"] = files.sha256(newest / "state.json")
    (newest / "manifest.json").write_text(json.dumps(hashes))
    refused = r"what differs: bank_order \(was None, is permutation\(seed, epoch, 1\)\)"
    with pytest.raises(IntegrityError, match=refused) if bank_size else nullcontext():
        runs.small_run(model, tmp_path / "run", store=store, bank_size=bank_size, resume=True, **LONG)


def test_other_vectors_of_the_same_teacher_do_not_resume(model: str, store: Path, tmp_path: Path) -> None:
    """A run on plain float16 is named by the fingerprint alone, so that those begun before stores were compressed go on."""
    student, data, stored = runs.prepared(model, store, 20, "static")
    config = TrainConfig(batch_size=8, resume=True)
    train(student, data, stored, losses.CosineDistance(), config, output=tmp_path / "run")
    state = json.loads(next((tmp_path / "run" / "checkpoints").glob("step-*/state.json")).read_text())
    fingerprint = json.dumps(stored.fingerprint, sort_keys=True).encode()
    assert state["identity"]["teacher"] == files.digest(fingerprint)[:12]
    smaller = compress(stored.path, tmp_path / "smaller", "int8")
    rows = replace(data, rows=smaller.find(stored.keys[data.rows]))
    with pytest.raises(IntegrityError, match="what differs: teacher"):
        train(student, rows, smaller, losses.CosineDistance(), config, output=tmp_path / "run")


def test_settings_that_do_not_change_the_run_may_change(
    model: str, store: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    cut_behind(uninterrupted, tmp_path / "run", 6)
    changed = {**LONG, "save_every": 1, "keep_checkpoints": 1}
    runs.small_run(model, tmp_path / "run", store=store, bank_size=16, resume=True, **changed)
    assert_same_state(tmp_path / "run", uninterrupted)


def test_losses_are_told_apart_by_their_options() -> None:
    def same() -> Loss:
        return partial(losses.cross_kl, temperature=0.1)

    assert loop._describe(same()) == loop._describe(same())
    assert loop._describe(same()) != loop._describe(partial(losses.cross_kl, temperature=0.2))
    assert loop._describe(losses.cross_kl) == "cross_kl"
    assert "0x" not in loop._describe(partial(losses.cross_kl))

    def summed(weight: float | losses.Schedule) -> str:
        return loop._describe(
            losses.WeightedSum({"a": losses.CrossKL(), "b": losses.GramMSE()}, {"a": 1.0, "b": weight})
        )

    assert len({summed(weight) for weight in (1.0, losses.linear_decay(1.0, 0.9), losses.linear_decay(1.0, 0.5))}) == 3


# The average, rates, the pull to the start, and the hard stage

FEATURES: dict[str, dict[str, Any]] = {
    "averaged": {"ema_decay": 0.8},
    "rates": {"projection_rate": 0.2, "layer_decay": 0.5, "table_rate": 3.0},
    "static rates": {"kind": "static", "projection_rate": 0.2, "token_weight_rate": 4.0, "table_rate": 3.0},
    "pulled": {"kind": "static", "start_decay": 50.0},
    "hard": {"hard_stage": 0.6, "hard_neighbours": 3, "hard_margin": 1.0},
    "all": {"kind": "static", "ema_decay": 0.8, "start_decay": 50.0, "hard_stage": 0.5, "hard_margin": 1.0},
}
PLAIN = {name: options.get("kind", "layers") for name, options in FEATURES.items()}


@pytest.fixture(scope="module")
def featured(model: str, store: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Run]]:
    """An uninterrupted run with each, and one of each kind without."""
    folder = tmp_path_factory.mktemp("featured")
    options = {"static": {"kind": "static"}, "layers": {"kind": "layers"}} | FEATURES
    return {
        name: (folder / name, runs.small_run(model, folder / name, store=store, bank_size=16, **LONG, **more))
        for name, more in options.items()
    }


@pytest.mark.parametrize("name", FEATURES)
def test_a_run_resumed_in_the_middle_of_it_differs_in_no_bit(
    model: str, store: Path, tmp_path: Path, featured: dict[str, tuple[Path, Run]], name: str
) -> None:
    whole, run = featured[name]
    cut_behind(whole, tmp_path / "run", 6)
    again = runs.small_run(model, tmp_path / "run", store=store, bank_size=16, resume=True, **LONG, **FEATURES[name])
    assert_same_state(tmp_path / "run", whole)
    for key, value in runs.weights(run).items():
        assert (runs.weights(again)[key] == value).all(), key


@pytest.mark.parametrize("name", FEATURES)
def test_it_changes_the_run(featured: dict[str, tuple[Path, Run]], name: str) -> None:
    plain, run = (featured[one][1] for one in (PLAIN[name], name))
    assert any((runs.weights(run)[key] != value).any() for key, value in runs.weights(plain).items())
    assert (curve(featured[name][0]) == curve(featured[PLAIN[name]][0])) is (name == "averaged")


def test_the_average_is_the_student_and_the_run_keeps_its_own_weights(
    featured: dict[str, tuple[Path, Run]],
) -> None:
    plain, averaged = (checkpointed(featured[name][0]) for name in ("layers", "averaged"))
    for key, value in plain["model"].items():
        assert torch.equal(averaged["model"][key], value), key
    found = runs.weights(featured["averaged"][1])
    assert "average" not in plain
    for key, value in averaged["average"].items():
        assert (found[key] == value.numpy()).all(), key
    assert any((found[key] != value.numpy()).any() for key, value in averaged["model"].items())


def test_a_finished_run_with_an_average_resumed_gives_the_average(
    model: str, store: Path, tmp_path: Path, featured: dict[str, tuple[Path, Run]]
) -> None:
    whole, run = featured["averaged"]
    cut_behind(whole, tmp_path / "run", 10)
    again = runs.small_run(
        model, tmp_path / "run", store=store, bank_size=16, resume=True, **LONG, **FEATURES["averaged"]
    )
    for key, value in runs.weights(run).items():
        assert (runs.weights(again)[key] == value).all(), key
    assert_same_state(tmp_path / "run", whole)


def test_a_run_with_an_average_does_not_go_on_without(
    model: str, store: Path, featured: dict[str, tuple[Path, Run]]
) -> None:
    with pytest.raises(IntegrityError, match=r"what differs: ema_decay \(was 0.8, is None\)"):
        runs.small_run(model, featured["averaged"][0], store=store, bank_size=16, resume=True, **LONG)


def test_settings_that_are_off_are_no_part_of_a_run() -> None:
    """What identified a run before there were any of them; a checkpoint of that time goes on."""
    assert set(TrainConfig().identity()) == {
        *("steps", "epochs", "batch_size", "accumulation", "learning_rate", "weight_decay", "warmup_fraction"),
        *("schedule", "clip_norm", "dropout", "bank_size", "mixed_precision", "seed"),
    }
    assert TrainConfig(ema_decay=0.9).identity()["ema_decay"] == 0.9


def test_rare_tokens_stay_near_their_start(model: str, store: Path, tmp_path: Path) -> None:
    """The pull shortens the way of tokens that come once far more than that of the commonest; unseen ones stay."""
    moved = {}
    for strength in (None, 30.0):
        student, data, stored = runs.prepared(model, store, 40, "static")
        before = student.backbone.table.detach().clone()
        config = TrainConfig(batch_size=8, epochs=6.0, learning_rate=1e-2, start_decay=strength)
        train(student, data, stored, losses.CosineDistance(), config, output=tmp_path / str(strength))
        moved[strength] = (student.backbone.table.detach().cpu() - before).norm(dim=1)
    counts = torch.bincount(data.tokens.ids.long(), minlength=len(before))
    groups = {"rare": counts == 1, "common": counts >= counts.topk(5).values.min(), "unseen": counts == 0}
    left = {name: float(moved[30.0][some].mean() / moved[None][some].mean()) for name, some in groups.items()}
    assert left["rare"] < 0.6
    assert left["common"] > 0.65
    assert left["unseen"] < 0.3  # what moves them is weight decay


def test_rows_are_pulled_back_at_the_rate_of_the_table(model: str, store: Path, tmp_path: Path) -> None:
    """Two ways to name the same rates of all parts."""
    common: dict[str, Any] = {"store": store, "kind": "static", "start_decay": 30.0}
    one = runs.small_run(model, tmp_path / "one", learning_rate=2**-6, table_rate=0.5, **common)
    twice = {"projection_rate": 2.0, "token_weight_rate": 2.0}
    other = runs.small_run(model, tmp_path / "other", learning_rate=2**-7, **twice, **common)
    assert_close_weights(runs.weights(one), runs.weights(other))


def test_the_bank_of_the_hard_stage_is_the_neighbours_of_the_batch(model: str, store: Path, tmp_path: Path) -> None:
    loss = Watching()
    student, data, stored = runs.prepared(model, store, 40, "static")
    options = {"batch_size": 8, "bank_size": 16, "epochs": 2.0}
    config = TrainConfig(**options, hard_stage=0.4, hard_neighbours=2, hard_margin=1.0)
    train(student, data, stored, loss, config, output=tmp_path / "hard")
    plain = Watching()
    train(runs.prepared(model, store, 40, "static")[0], data, stored, plain, TrainConfig(**options), output=tmp_path)
    for step, (given, usual) in enumerate(zip(loss.given, plain.given, strict=True)):
        assert torch.equal(given["keys"], usual["keys"])
        assert torch.equal(given["bank_keys"], usual["bank_keys"]) is (step < 6)
    vectors = torch.nn.functional.normalize(stored.take(data.rows).double(), dim=1)
    matrix, rows = vectors @ vectors.T, data.keys.tolist()
    matrix.fill_diagonal_(-2.0)
    for given in loss.given[6:]:
        batch = [rows.index(key) for key in given["keys"].tolist()]
        bank = [rows.index(key) for key in given["bank_keys"].tolist()]
        assert torch.equal(given["bank"], stored.take(data.rows[bank]))
        near = {row for text in batch for row in matrix[text].topk(2).indices.tolist()} - set(batch)
        assert near
        assert near == set(bank[: len(near)])
        assert len(set(bank)) == 16


def test_the_shortest_hard_stage_is_the_last_step(model: str, store: Path, tmp_path: Path) -> None:
    student, data, stored = runs.prepared(model, store, 40, "static")
    banks = []
    for stage in (None, 0.01):
        loss = Watching()
        config = TrainConfig(batch_size=8, bank_size=16, hard_stage=stage, hard_neighbours=1)
        train(student, data, stored, loss, config, output=tmp_path)
        banks.append([given["bank_keys"].tolist() for given in loss.given])
    assert [one == other for one, other in zip(*banks, strict=True)] == [True] * 4 + [False]


@pytest.mark.parametrize(("loss", "said"), [("cosine", True), ("contrastive", False)])
def test_a_bank_that_the_loss_does_not_use_is_told(
    loss: str, said: bool, model: str, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs.small_run(model, tmp_path, store=store, loss=loss, bank_size=16, steps=1, resume=True)
    err = capsys.readouterr().err
    assert ("no bank of 16 rows: the loss uses none" in err) == said
    assert f"no checkpoint in {tmp_path / 'checkpoints'}: from the first step" in err


def test_the_hard_stage_needs_a_loss_with_a_bank(model: str, store: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"--train.hard-stage fills the bank of a loss, and this one uses none"):
        runs.small_run(model, tmp_path, store=store, loss="cosine", bank_size=16, hard_stage=0.5)


# Real processes: stops


def stopping(model: str, output: str, store: str, signals: list[int], at: int, **config: Any) -> list[int]:
    """In a process of its own: a run that gets signals while it works on a step."""
    import os

    step = loop._Loop._step

    def interrupted(self: Any, number: int, ends: Any) -> Any:
        if number == at and distributed.rank() == distributed.world_size() - 1:
            for one in signals:
                os.kill(os.getpid(), one)
        return step(self, number, ends)

    loop._Loop._step = interrupted  # type: ignore[method-assign]
    try:
        runs.small_run(model, output, store=store, **config)
    except Stopped as stopped:
        return [stopped.exit_code]
    except KeyboardInterrupt:
        return [130, 130]
    finally:
        loop._Loop._step = step  # type: ignore[method-assign]
    return []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_run_is_saved_and_goes_on(
    model: str, store: Path, uninterrupted: Path, tmp_path: Path, number: int, code: int
) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    options = {**LONG, "bank_size": 16}
    assert stopping(model, str(tmp_path), str(store), [number], 4, **options) == [code]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert checkpoint._problem(tmp_path / "checkpoints" / "step-00000005") is None
    assert curve(tmp_path) == curve(uninterrupted)[:5]
    runs.small_run(model, tmp_path, store=store, resume=True, **options)
    assert_same_state(tmp_path, uninterrupted)


def test_a_second_signal_stops_at_once(model: str, store: Path, tmp_path: Path) -> None:
    assert stopping(model, str(tmp_path), str(store), [signal.SIGINT, signal.SIGINT], 4) == [130, 130]
    assert len(log(tmp_path)) == 4


def test_a_signal_in_the_last_step_is_a_finished_run(model: str, store: Path, tmp_path: Path) -> None:
    assert stopping(model, str(tmp_path), str(store), [signal.SIGTERM], 4) == []


def slow_run(model: str, output: str, store: str, seconds: float, **config: Any) -> float:
    """In a process of its own: a run whose steps take a while."""
    import time

    step = loop._Loop._step

    def slowly(self: Any, number: int, ends: Any) -> Any:
        time.sleep(seconds)
        return step(self, number, ends)

    loop._Loop._step = slowly  # type: ignore[method-assign]
    return runs.small_run(model, output, store=store, **config).final_loss


def test_a_killed_run_goes_on_to_the_same_bits(model: str, store: Path, uninterrupted: Path, tmp_path: Path) -> None:
    output, options = tmp_path / "run", {**LONG, "bank_size": 16}
    group = processes.start(slow_run, 1, tmp_path, model=model, output=output, store=store, seconds=0.3, **options)
    group.wait_until(lambda: (output / "metrics.jsonl").exists() and len(curve(output)) >= 5)
    group.kill()
    assert 5 <= len(curve(output)) < 10
    assert (output / "checkpoints" / "step-00000003").exists()
    runs.small_run(model, output, store=store, resume=True, **options)
    assert_same_state(output, uninterrupted)


def test_a_launcher_that_is_stopped_leaves_a_whole_checkpoint(model: str, store: Path, tmp_path: Path) -> None:
    """torchrun on CPUs: its processes have joined, its SIGTERM reaches both, and the run goes on as one process."""
    output, options = tmp_path / "run", {**LONG, "dropout": 0.0}
    group = processes.launch(slow_run, 2, tmp_path, model=model, output=output, store=store, seconds=0.3, **options)
    group.wait_until(lambda: (output / "metrics.jsonl").exists() and len(curve(output)) >= 2)
    group.processes[0].terminate()
    assert group.wait(60) != [0]
    steps = len(curve(output))
    assert 2 <= steps < 10
    assert checkpoint._problem(output / "checkpoints" / f"step-{steps:08d}") is None
    assert "Run the same command with --train.resume to go on" in group.output()
    assert {"0.cpu", "1.cpu"} <= checkpointed(output)["rng"].keys()
    runs.small_run(model, output, store=store, resume=True, **options)
    runs.small_run(model, tmp_path / "alone", store=store, **options)
    np.testing.assert_allclose(curve(output), curve(tmp_path / "alone"), rtol=1e-5)


def test_processes_that_did_not_join_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    distributed.device()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ResourceError, match="the launcher started 2 processes and 1 joined"):
        distributed.device()


@pytest.mark.parametrize(
    ("processes", "devices", "visible", "refused"),
    [
        (2, 2, None, None),
        (3, 2, None, "3 processes on 2 devices"),
        (2, 1, None, "2 processes on 1 device:"),
        (8, 1, "5", None),
        (8, 4, "0,1,2,3", "8 processes on 4 devices"),
    ],
)
def test_more_processes_than_devices_are_refused(
    monkeypatch: pytest.MonkeyPatch, processes: int, devices: int, visible: str | None, refused: str | None
) -> None:
    distributed.device()
    for name in ("ACCELERATE_USE_CPU", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: devices)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    with pytest.raises(ResourceError, match=refused) if refused else nullcontext():
        distributed.device()


# Real processes: many as one

MANY: dict[str, dict[str, Any]] = {
    "contrastive": {"loss": "contrastive", "bank_size": 16, "epochs": 2.0},
    "uneven": {"loss": "gram", "count": 13, "batch_size": 4, "epochs": 2.0},  # the last batch has one row
    "accumulated": {"loss": "sum", "accumulation": 3, "epochs": 2.0, "bank_size": 16},
    "static": {"loss": "sum", "kind": "static", "count": 3, "epochs": 2.0},
    "in micro-batches": {"loss": "sum", "micro_batch": 1, "count": 13, "accumulation": 2, "epochs": 2.0},
    "float64": {"loss": "sum", "dtype": torch.float64, "bank_size": 16, "epochs": 4.0},
    "averaged": {"loss": "sum", "bank_size": 16, "epochs": 2.0, "ema_decay": 0.8},
    "rates": {"loss": "sum", "bank_size": 16, "epochs": 2.0, "projection_rate": 0.2, "layer_decay": 0.5},
    "hard": {"bank_size": 16, "epochs": 2.0, "hard_stage": 0.6, "hard_neighbours": 3, "hard_margin": 1.0},
    "pulled": {"kind": "static", "bank_size": 16, "epochs": 2.0, "start_decay": 50.0, "ema_decay": 0.8},
}


def many_runs(model: str, store: str, folder: str) -> dict[str, Any]:
    """In one of several processes: all of MANY, a stop on one process, a NaN on one, a resume with dropout."""
    here = Path(folder)
    finals, averages = {}, []
    for name, options in MANY.items():
        run = runs.small_run(model, here / name, store=store, **options)
        finals[name] = {key: value.ravel().tolist() for key, value in runs.weights(run).items()}
        averages += [files.digest(value.tobytes()) for value in runs.weights(run).values() if "ema_decay" in options]
    found: dict[str, Any] = {"weights": finals if distributed.is_main() else None, "averages": averages}
    runs.small_run(model, here / "whole", store=store, **LONG)
    found["codes"] = stopping(model, str(here / "stopped"), store, [signal.SIGTERM], 4, **LONG)
    runs.small_run(model, here / "stopped", store=store, resume=True, **LONG)
    student, data, stored = unique_word(model, here / "poisoned")
    before = {name: value.clone() for name, value in student.state_dict().items()}
    try:
        train(student, data, stored, losses.CosineDistance(), TrainConfig(batch_size=21), output=here / "nan")
    except DistillError as error:
        found["error"] = f"{type(error).__name__}: {error}"
    found["unchanged"] = all(
        torch.equal(value.cpu().nan_to_num(), before[name].nan_to_num()) for name, value in student.state_dict().items()
    )
    loss = Watching()
    student, data, stored = runs.prepared(model, store, 40, "static")
    train(student, data, stored, loss, TrainConfig(batch_size=8, bank_size=16), output=here / "watched")
    found["bank"] = [given["bank_keys"].tolist() for given in loss.given]
    found["keys"] = [given["keys"].tolist() for given in loss.given]
    return found


@pytest.fixture(scope="module")
def two(model: str, store: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("two")
    return folder, processes.run(many_runs, 2, folder, model=model, store=store, folder=folder)


@pytest.mark.parametrize("name", MANY)
def test_two_processes_train_as_one(name: str, two: tuple[Path, list], model: str, store: Path, tmp_path: Path) -> None:
    folder, found = two
    run = runs.small_run(model, tmp_path, store=store, **MANY[name])
    limit = 1e-10 if name == "float64" else 1e-5
    np.testing.assert_allclose(curve(folder / name), curve(tmp_path), rtol=limit, atol=limit)
    assert [entry["texts"] for entry in log(folder / name)] == [entry["texts"] for entry in log(tmp_path)]
    theirs = {key: np.array(value) for key, value in found[0]["weights"][name].items()}
    assert_close_weights({key: value.ravel() for key, value in runs.weights(run).items()}, theirs)


def test_two_processes_hold_one_average(two: tuple[Path, list]) -> None:
    first, second = two[1]
    assert first["averages"] == second["averages"] != []


def test_two_processes_stop_and_resume_in_no_bit_different(two: tuple[Path, list]) -> None:
    folder, found = two
    assert [one["codes"] for one in found] == [[143], [143]]
    assert_same_state(folder / "stopped", folder / "whole")
    assert {"0.cpu", "1.cpu"} <= checkpointed(folder / "whole")["rng"].keys()


def test_a_nan_on_one_process_stops_both_before_the_update(two: tuple[Path, list]) -> None:
    folder, found = two
    for one in found:
        assert one["error"].startswith("NumericsError: step 1: loss nan")
        assert one["unchanged"]
    assert [row["text"] for row in json.loads((folder / "nan" / "non-finite.json").read_text())["rows"]] == ["x x x"]


def test_two_processes_see_one_bank_and_one_batch(two: tuple[Path, list]) -> None:
    first, second = two[1]
    assert first["bank"] == second["bank"]
    assert first["keys"] == second["keys"]
    assert all(len(keys) == 8 for keys in first["keys"])


# What follows needs a GPU: pytest -m gpu.

WAITING: dict[str, dict[str, Any]] = {
    "static": {"kind": "static", "bank_size": 16},
    "rows of a static table": {"kind": "static", "bank_size": 16, "table_update": "rows", "ema_decay": 0.9},
    "layers without padding": {"loss": "sum", "bank_size": 16, "mixed_precision": "bf16"},
}


@pytest.mark.gpu
@pytest.mark.parametrize("kind", WAITING)
def test_the_host_waits_for_the_device_once_a_step(kind: str, model: str, store: Path, tmp_path: Path) -> None:
    def waits(steps: int) -> int:
        options = {**WAITING[kind], "steps": steps, "save_every": 100}
        return runs.waits_for_the_device(partial(runs.small_run, model, tmp_path / str(steps), store=store, **options))

    waits(5)  # what is tried once
    few, many = waits(5), waits(15)
    assert many - few == 10
