"""N processes give the loss and the gradient of one process: real processes, real DDP, every loss."""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import jaxtyping
import processes
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distill import distributed, losses
from distill.errors import DataError, Stopped
from distill.losses import WeightedSum
from distill.streaming import engine
from distill.training import stopping

LOSSES: dict[str, Callable[[], nn.Module]] = {
    "CosineDistance": losses.CosineDistance,
    "EmbeddingMSE": losses.EmbeddingMSE,
    "CrossKL": lambda: losses.CrossKL(temperature=0.1),
    "CrossKL with a teacher_temperature": lambda: losses.CrossKL(temperature=0.2, teacher_temperature=0.1),
    "CrossContrastive": lambda: losses.CrossContrastive(temperature=0.1),
    "CrossContrastive, symmetric": lambda: losses.CrossContrastive(temperature=0.1, symmetric=True),
    "CrossMSE": losses.CrossMSE,
    "GramMSE": losses.GramMSE,
    "SimilarityPreserving": losses.SimilarityPreserving,
    "CKA": losses.CKA,
    "GramKL": lambda: losses.GramKL(temperature=0.1),
    "RKDDistance": losses.RKDDistance,
    "RKDAngle": losses.RKDAngle,
    "RKDAngle at some anchors": lambda: losses.RKDAngle(anchors=3),
    "RankHinge": lambda: losses.RankHinge(margin=0.3),
    "ScoreKL": losses.ScoreKL,
    "MarginMSE": losses.MarginMSE,
    "Matryoshka": lambda: losses.Matryoshka(losses.CrossKL(temperature=0.1), (3, WIDTH)),
    "WeightedSum": lambda: WeightedSum(
        {"cross": losses.CrossKL(temperature=0.1), "gram": losses.GramMSE()}, {"cross": 1.0, "gram": 0.3}
    ),
}
SIZES = {
    1: [[8]],
    2: [[4, 4], [6, 2], [8, 0], [0, 8]],
    3: [[3, 3, 2], [4, 4, 0], [1, 7, 0]],
    4: [[2, 2, 2, 2], [1, 0, 5, 2]],
}
WIDTH, ROWS, BANK = 6, 8, 5
TILE = engine.TILE


def inputs(dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    draw = {name: torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64) for name, rows in SHAPES.items()}
    keys = torch.tensor([0, 1, 2, 1, 4, 5, 6, 7])  # two rows are the same text
    return {name: value.to(dtype) for name, value in draw.items()} | {"keys": keys, "bank_keys": torch.arange(BANK) + 3}


SHAPES = {"texts": ROWS, "teacher": ROWS, "bank": BANK, "weight": WIDTH}


def columns_of(loss: nn.Module, data: dict[str, Tensor], names: tuple[str, ...]) -> dict[str, Tensor]:
    return {name: data[name] for name in names} if getattr(loss, "uses_bank", False) else {}


def linear(data: dict[str, Tensor]) -> nn.Linear:
    model = nn.Linear(WIDTH, WIDTH, bias=False, dtype=data["weight"].dtype)
    model.weight.data.copy_(data["weight"])
    return model


def cases() -> Iterator[tuple[str, tuple[str, ...]]]:
    for name, make in LOSSES.items():
        yield name, ()
        if getattr(make(), "uses_bank", False):
            yield name, ("bank",)
            yield name, ("keys",)
            yield name, ("bank", "keys", "bank_keys")


def worst_errors(sizes: list[list[int]]) -> dict[str, list[Any]]:
    """In one of several processes: the largest error of value and gradient for every loss, and of the known-wrong scheme."""
    found: dict[str, list[Any]] = {"right": [], "local rows": [], "mean of means": []}
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        data = inputs(dtype)
        for each, tile, batches in [(each, TILE, 1) for each in sizes] + [(sizes[-1], 3, 1), (sizes[0], TILE, 4)]:
            engine.TILE = tile
            for name, names in cases():
                error = _error(LOSSES[name](), data, each, names, batches=batches)
                if error > tolerance:
                    found["right"].append([name, list(names), each, tile, batches, str(dtype), error])
    engine.TILE = TILE
    for each in sizes:
        found["local rows"].append(
            [_error(LOSSES[name](), data, each, (), _local_rows) for name in ("GramMSE", "GramKL")]
        )
        if min(each):
            found["mean of means"].append([_error(LOSSES[name](), data, each, (), _mean_of_means) for name in LOSSES])
    return found


def _error(
    loss: nn.Module,
    data: dict[str, Tensor],
    sizes: list[int],
    names: tuple[str, ...],
    scheme: Callable[..., Any] | None = None,
    batches: int = 1,
) -> float:
    """The larger of the errors of value and gradient against one process with all rows, relative to the gradient's size.

    Several batches are accumulated; processes exchange gradients with the last.
    """
    extra = columns_of(loss, data, names)
    keys = extra.pop("keys", None)
    alone, model = linear(data), DistributedDataParallel(linear(data)) if dist.is_initialized() else linear(data)
    error = 0.0
    for number in range(batches):
        rows = torch.arange(ROWS).roll(number)
        texts, teacher, own_keys = (
            data["texts"][rows],
            data["teacher"][rows],
            {} if keys is None else {"keys": keys[rows]},
        )
        expected = loss(alone(texts), teacher, **extra, **own_keys) / batches
        expected.backward()
        bounds = torch.tensor([0, *sizes]).cumsum(0)
        mine = slice(int(bounds[distributed.rank()]), int(bounds[distributed.rank() + 1]))
        own_keys = {name: value[mine] for name, value in own_keys.items()}
        alone_yet = dist.is_initialized() and number < batches - 1
        with model.no_sync() if alone_yet else nullcontext():
            vectors = model(texts[mine]) if sizes[distributed.rank()] else model(texts[:1])[:0]
            if scheme:
                value = scheme(loss, vectors, teacher[mine]) / batches
            else:
                value = distributed.global_loss(loss, vectors, teacher[mine], **extra, **own_keys) / batches
            value.backward()
        error = max(error, abs(value.item() - expected.item()) / max(1.0, abs(expected.item())))
    gradient = next(model.parameters()).grad
    assert gradient is not None
    assert alone.weight.grad is not None
    difference = (gradient - alone.weight.grad).abs().max() / alone.weight.grad.abs().max().clamp(min=1.0)
    return max(float(difference), error)


def _local_rows(loss: nn.Module, student: Tensor, teacher: Tensor) -> Tensor:
    """Gather without gradient, and no factor for DDP's mean: every process keeps its own rows' gradient only."""
    everyone = list(distributed.gather_rows(student).split(distributed.gather_objects(len(student))))
    everyone[distributed.rank()] = student
    return loss(torch.cat(everyone), distributed.gather_rows(teacher))


def _mean_of_means(loss: nn.Module, student: Tensor, teacher: Tensor) -> Tensor:
    return loss(student, teacher)


def collectives() -> dict[str, Any]:
    """In one of several processes: what the small functions give."""
    rank, world = distributed.rank(), distributed.world_size()
    sizes = [3 * (world - 1 - number) for number in range(world)]  # the last has none
    rows = torch.arange(sizes[rank] * 2.0).view(-1, 2) + 100 * rank
    expected = torch.cat([torch.arange(size * 2.0).view(-1, 2) + 100 * number for number, size in enumerate(sizes)])
    empty = distributed.gather_rows(torch.zeros(0, 4))
    errors = {
        "main_first": _message(lambda: distributed.main_first(_fail)),
        "everywhere": _message(lambda: distributed.everywhere(_fail if rank == world - 1 else int)),
        "foreign": _message(lambda: distributed.main_first(_fail_strangely)),
    }
    return {
        "rows": bool(torch.equal(distributed.gather_rows(rows.requires_grad_()), expected)),
        "numbers": distributed.gather_rows(torch.full((rank,), rank)).tolist(),
        "empty": list(empty.shape),
        "grad": distributed.gather_rows(rows).requires_grad,
        "agree": distributed.agree(f"from {rank}"),
        "objects": distributed.gather_objects(rank),
        "all": distributed.everywhere(lambda: rank * 2),
        "any": [distributed.any_process(rank == world - 1), distributed.any_process(False)],
        "each": distributed.any_process_each([rank == 0, False, rank == world - 1, True]),
        "share": [[*distributed.share(count)] for count in (0, 1, 2, 7, 8)],
        "infinite": infinite(),
        "main": distributed.main_first(lambda: rank),
        "errors": errors,
    }


def infinite() -> float:
    rows = torch.full((1, 2), 1e3)
    return float(distributed.global_loss(lambda student, teacher: student.exp().sum(), rows, rows))


class Strange(Exception):
    """As some libraries' exceptions: what it was made of cannot be sent to another process."""

    def __init__(self, *, response: object):
        super().__init__("no route")
        self.response = response


def _fail() -> None:
    raise DataError("row 7")


def _fail_strangely() -> None:
    raise Strange(response=lambda: None)


def _message(action: Callable[[], Any]) -> str:
    try:
        return f"returned {action()}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def only_the_first_wants_a_gradient() -> None:
    """In one of several processes: none waits for a collective that another leaves out."""
    for name, make in LOSSES.items():
        student, teacher = torch.randn(6, WIDTH), torch.randn(6, WIDTH)
        student.requires_grad_(distributed.is_main())
        assert distributed.global_loss(make(), student, teacher).isfinite(), name


def compiled() -> dict[str, list[float]]:
    """In one of two processes: value and error of the gradient of what torch.compile made, inside and outside."""
    jaxtyping.config.update("jaxtyping_disable", True)  # shape checks cannot be compiled
    data, mine = inputs(torch.float64), slice(0, 5) if distributed.is_main() else slice(5, ROWS)
    student, teacher = data["texts"], data["teacher"]
    loss = losses.CrossKL(temperature=0.1)
    step = torch.compile(lambda rows, twins: distributed.global_loss(loss, rows, twins), backend="eager")
    own = torch.compile(loss, backend="eager")
    found = {"expected": [float(loss(student, teacher)), 0.0]}
    alone = {"expected, alone": loss, "alone": own}
    together = {"step": step, "loss": lambda rows, twins: distributed.global_loss(own, rows, twins)}
    for name, function in {**alone, **together, "alone, again": own, "loss, again": together["loss"]}.items():
        leaf, whole = (rows.clone().requires_grad_() for rows in (student[mine], student))
        value = function(leaf, teacher[mine])
        value.backward()
        of_all = name in ("step", "loss", "loss, again")
        expected = 2 * loss(whole, teacher) if of_all else loss(whole[mine], teacher[mine])
        expected.backward()
        found[name] = [float(value), float((leaf.grad - whole.grad[mine]).abs().max())]
    return found


def everything(sizes: list[list[int]]) -> dict[str, Any]:
    only_the_first_wants_a_gradient()
    return {"errors": worst_errors(sizes), "collectives": collectives()}


@pytest.fixture(scope="module", params=[2, 3, pytest.param(4, marks=pytest.mark.slow)])
def spawned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    world = request.param
    return processes.run(everything, world, tmp_path_factory.mktemp("distributed"), sizes=SIZES[world])


def test_every_loss_has_a_place_in_the_table() -> None:
    modules = {name for name in losses.__all__ if isinstance(getattr(losses, name), type)}
    assert modules - {"Schedule"} <= {name.split(",")[0].split(" ")[0] for name in LOSSES}


def test_value_and_gradient_of_any_number_of_processes_are_those_of_one(spawned: list[dict[str, Any]]) -> None:
    assert [result["errors"]["right"] for result in spawned] == [[]] * len(spawned)


def test_the_known_wrong_schemes_are_seen_to_be_wrong(spawned: list[dict[str, Any]]) -> None:
    for result in spawned:
        assert all(error > 1e-3 for errors in result["errors"]["local rows"] for error in errors)
        assert all(max(errors) > 1e-3 for errors in result["errors"]["mean of means"])


def test_collectives(spawned: list[dict[str, Any]]) -> None:
    world = len(spawned)
    found = [result["collectives"] for result in spawned]
    for rank, result in enumerate(found):
        assert (result["rows"], result["empty"], result["grad"]) == (True, [0, 4], False)
        assert result["numbers"] == [number for number in range(world) for _ in range(number)]
        assert (result["agree"], result["main"]) == ("from 0", 0)
        assert result["objects"] == [*range(world)]
        assert result["all"] == [2 * number for number in range(world)]
        assert result["any"] == [True, False]
        assert result["each"] == [True, False, True, True]
        assert result["infinite"] == torch.inf
        own, told = "Strange: no route", "RuntimeError: Strange: no route"
        assert result["errors"] == {
            "main_first": "DataError: row 7",
            "everywhere": "DataError: row 7",
            "foreign": told if rank else own,
        }
    for place, count in enumerate((0, 1, 2, 7, 8)):
        shares = [result["share"][place] for result in found]
        assert [row for share in shares for row in share] == [*range(count)]
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_compiled_loss_is_that_of_the_global_batch_inside_and_of_its_own_rows_outside(tmp_path: Path) -> None:
    for found in processes.run(compiled, 2, tmp_path):
        assert max(error for _, error in found.values()) < 1e-12
        for name in ("step", "loss", "loss, again"):
            assert found[name][0] == pytest.approx(found["expected"][0], rel=1e-12)
        for name in ("alone", "alone, again"):
            assert found[name][0] == pytest.approx(found["expected, alone"][0], rel=1e-12)


def test_a_bank_for_a_function_is_refused_rather_than_dropped() -> None:
    rows = torch.randn(3, 2)
    with pytest.raises(ValueError, match=r"cross_kl, which has no `uses_bank`.* CrossKL\(\), not cross_kl"):
        distributed.global_loss(losses.cross_kl, rows, rows, bank=rows)


def test_keys_for_a_function_that_takes_them_are_refused_rather_than_dropped() -> None:
    rows, keys = torch.randn(3, 2), torch.zeros(3, dtype=torch.int64)
    for loss in (losses.cross_kl, partial(losses.cross_kl, temperature=0.1)):
        with pytest.raises(ValueError, match=r"got keys for .* which has no `uses_bank`"):
            distributed.global_loss(loss, rows, rows, keys=keys)
    no_bank = losses.WeightedSum({"a": losses.CosineDistance()}), losses.Matryoshka(losses.CosineDistance(), (1, 2))
    for loss in (*no_bank, losses.gram_mse, losses.GramMSE(), torch.nn.functional.mse_loss, torch.dist):
        distributed.global_loss(loss, rows, rows, keys=keys)  # same texts are nothing that these could leave out


def other_rows() -> list[str]:
    """In one of two processes: what is said of rows of another dtype, and of another width."""
    dtype, width = (torch.float32, 4) if distributed.is_main() else (torch.float64, 5)
    teacher = torch.randn(3, 6)
    students = torch.randn(3, 4, dtype=dtype), torch.randn(3, width)
    return [_message(lambda: distributed.global_loss(losses.GramMSE(), rows, teacher)) for rows in students]  # noqa: B023


def test_students_of_another_dtype_or_width_are_refused_on_every_process(tmp_path: Path) -> None:
    for found in processes.run(other_rows, 2, tmp_path):
        assert all("ValueError: processes share rows of one dtype and width, got torch.float" in said for said in found)


def test_one_process_needs_no_group() -> None:
    assert worst_errors(SIZES[1])["right"] == []
    rows = torch.randn(3, 2, requires_grad=True)
    assert not distributed.gather_rows(rows).requires_grad
    assert (distributed.agree(5), distributed.gather_objects(5), distributed.any_process(True)) == (5, [5], True)
    assert distributed.everywhere(lambda: 5) == [5]
    assert distributed.share(4) == range(4)
    with pytest.raises(DataError, match="row 7"):
        distributed.main_first(_fail)
    with pytest.raises(Strange):
        distributed.everywhere(_fail_strangely)


def test_another_thread_has_no_part_in_a_share() -> None:
    rows = torch.randn(4, 2)
    with engine.sharing(engine.Share([2, 2], 0)), ThreadPoolExecutor(1) as pool:
        elsewhere = pool.submit(losses.embedding_mse, rows, -rows).result()
        with pytest.raises(ValueError, match="4 rows of a batch of which this process holds 2"):
            losses.embedding_mse(rows, -rows)
    assert elsewhere == losses.embedding_mse(rows, -rows)


def test_one_ctrl_c_ends_all_and_whoever_finds_the_others_gone_says_what_stopped_it(tmp_path: Path) -> None:
    group = processes.start(_stopped_last, 2, tmp_path)
    assert group.wait() == [0, 143], group.output()
    assert json.loads((group.folder / "0.json").read_text()) == [143, 143, 143]


def _stopped_last() -> list[int]:
    dist.barrier()
    if not distributed.is_main():
        os._exit(143)
    found = []
    for together in (distributed.everywhere, distributed.main_first):
        try:
            together(_terminated)
        except Stopped as error:
            found.append(error.exit_code)
    try:
        with stopping.stop_signals():
            signal.raise_signal(signal.SIGTERM)
            distributed.gather_objects(0)
    except Stopped as error:
        found.append(error.exit_code)
    return found


def _terminated() -> None:
    time.sleep(1)  # the other one is gone by then
    raise Stopped("terminated", 143)


def test_a_hung_group_is_killed_and_its_output_shown(tmp_path: Path) -> None:
    group = processes.start(_hang, 1, tmp_path)
    group.wait_until(lambda: "rank 0 waits" in group.output())
    with pytest.raises(AssertionError, match=r"(?s)hung.*rank 0 waits"):
        group.wait(timeout_seconds=0.5)
    assert [process.returncode for process in group.processes] == [-signal.SIGKILL]


def _hang() -> None:
    print(f"rank {distributed.rank()} waits", flush=True)
    time.sleep(600)
