"""A step's gradients on several processes: those of one process, exchanged once, whoever runs out of memory."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distill import distributed, losses
from distill.errors import ResourceError
from distill.modules import StaticTable, Tokens
from distill.training import gradients
from distill.training.gradient_cache import backward_in_micro_batches, exchange_gradients
from distill.training.gradients import BatchPart, StepGradients

LOSSES: dict[str, Callable[[], nn.Module]] = {
    "CrossKL": lambda: losses.CrossKL(temperature=0.1),
    "CrossContrastive": lambda: losses.CrossContrastive(temperature=0.5),
    "GramMSE": losses.GramMSE,
    "WeightedSum": lambda: losses.WeightedSum({"kl": losses.CrossKL(temperature=0.1), "gram": losses.GramMSE()}),
}
SIZES = {1: [[8]], 2: [[4, 4], [6, 2], [8, 0], [0, 8]]}
ROWS, WIDTH = 8, 6


class Texts(nn.Module):
    """Tokens -> vectors, as an encoder; `refuse` is told of every pass, and how many texts it has."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(3)
        self.table = StaticTable(torch.randn(50, WIDTH, generator=draw))
        self.linear = nn.Linear(WIDTH, WIDTH)
        nn.init.normal_(self.linear.weight, generator=draw)
        nn.init.zeros_(self.linear.bias)
        self.refuse: Callable[[str, int], None] = lambda where, count: None

    def forward(self, tokens: Tokens) -> Tensor:
        vectors = self.linear(self.table(tokens).tanh())
        self.refuse("with" if torch.is_grad_enabled() else "without", len(tokens))
        if vectors.requires_grad:
            inner = vectors.grad_fn.next_functions[1][0]
            inner.register_prehook(lambda gradient: self.refuse("backward", len(tokens)))
        return vectors


def texts(seed: int, count: int = ROWS, longest: int = 9) -> tuple[Tokens, Tensor]:
    """Tokens, and teacher vectors."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=draw)
    rows = [torch.randint(50, (length,), generator=draw).tolist() for length in lengths.tolist()]
    return Tokens.from_lists(rows), torch.randn(count, WIDTH, generator=draw)


def part(sizes: list[int]) -> Tensor:
    bounds = torch.tensor([0, *sizes]).cumsum(0)
    return torch.arange(int(bounds[distributed.rank()]), int(bounds[distributed.rank() + 1]))


def wrapped(model: nn.Module, counted: list[int]) -> nn.Module:
    """The model in DDP, whose all-reduces of gradients are counted."""
    if not dist.is_initialized():
        return model
    ddp = DistributedDataParallel(model)

    def hook(group: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        counted.append(bucket.buffer().numel())
        buffer = bucket.buffer().div_(distributed.world_size())
        return dist.all_reduce(buffer, async_op=True).get_future().then(lambda done: done.value()[0])

    ddp.register_comm_hook(None, hook)
    return ddp


def flat(model: nn.Module) -> Tensor:
    return torch.cat([value.grad.flatten() for value in model.parameters() if value.grad is not None])


def error(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


# A loop of one's own


def own_loop(sizes: list[int], micro_batch: int, name: str) -> list[float]:
    """The errors of value and gradient of two accumulated batches, and how many all-reduces there were."""
    alone, mine, counted = Texts(), Texts(), []
    ddp, rows, loss = wrapped(mine, counted), part(sizes), LOSSES[name]()
    values, expected = [], []
    for batch in range(2):
        tokens, teacher = texts(batch)
        expected.append(loss(alone(tokens), teacher) / 2)
        expected[-1].backward()
        values.append(
            backward_in_micro_batches(
                lambda some, tokens=tokens: mine(tokens.rows(rows[some])),
                tokens.lengths[rows],
                lambda vectors, teacher=teacher: distributed.global_loss(loss, vectors, teacher[rows]) / 2,
                micro_batch=micro_batch,
                any_process=distributed.any_process,
            )
        )
    if dist.is_initialized():
        exchange_gradients(ddp, tokens.rows(torch.tensor([0])))
    return [
        error(flat(mine), flat(alone)),
        abs(float(sum(values) / sum(expected).detach()) - 1),
        len(counted),
    ]


def through_ddp() -> None:
    """In one of two processes: micro-batches through the wrapper, under no_sync. In step 2 it rearranges its buckets in forward."""
    mine, rows = Texts(), part([7, 1])
    ddp = DistributedDataParallel(mine)
    for step in range(3):
        tokens, teacher = texts(step)
        with ddp.no_sync():
            backward_in_micro_batches(
                lambda some, tokens=tokens: ddp(tokens.rows(rows[some])),
                tokens.lengths[rows],
                lambda vectors, teacher=teacher: distributed.global_loss(losses.gram_mse, vectors, teacher[rows]),
                micro_batch=3,
            )
        exchange_gradients(ddp, tokens.rows(torch.tensor([0])))
        print(f"step {step + 1} done", flush=True)


@pytest.mark.slow
def test_micro_batches_through_ddp_itself_wait_forever(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"(?s)(hung|exit codes).*step 1 done") as caught:
        processes.run(through_ddp, 2, tmp_path, timeout_seconds=30)
    assert "step 3 done" not in str(caught.value)


# A step of training


def batches(step: int, sizes: list[list[int]]) -> list[tuple[Tokens, Tensor, float]]:
    """Tokens, teacher vectors and weights of a step's batches; short ones at step 2, longer ones than ever at step 3."""
    drawn = [
        texts(10 * step + number, sum(each), longest={2: 2, 3: 30}.get(step, 9)) for number, each in enumerate(sizes)
    ]
    total = sum(map(sum, sizes))
    return [(*one, sum(each) / total) for one, each in zip(drawn, sizes, strict=True)]


def share(tokens: Tokens, teacher: Tensor, weight: float, sizes: list[int]) -> BatchPart:
    rows = part(sizes)
    own = tokens.rows(rows if len(rows) else torch.tensor([0]))
    return BatchPart(
        own,
        len(rows),
        max(sizes),
        lambda vectors: weight * distributed.global_loss(losses.gram_mse, vectors, teacher[rows]),
    )


def steps(sizes: list[list[int]], micro_batch: int, where: str = "", most: int = 0, at: int = 0) -> dict[str, Any]:
    """Six steps, in which the last process has no memory for more than `most` texts from step `at` on."""
    mine, counted, through = Texts(), [], []
    model = wrapped(mine, counted)
    model.register_forward_pre_hook(lambda _, given: through.append(len(given[0])))
    adding = StepGradients(mine, model, micro_batch=micro_batch, device=torch.device("cpu"))
    found: dict[str, Any] = {"errors": [], "exchanges": [], "through DDP": []}
    for step in range(6):
        if where and step == at and distributed.rank() == distributed.world_size() - 1:
            mine.refuse = partial(_refuse, where, most)
        alone = Texts()
        expected = sum(
            weight * losses.gram_mse(alone(tokens), teacher) for tokens, teacher, weight in batches(step, sizes)
        )
        assert isinstance(expected, Tensor)
        expected.backward()
        mine.zero_grad()
        counted.clear()
        through.clear()
        value = adding.add([share(*one, each) for one, each in zip(batches(step, sizes), sizes, strict=True)])
        found["errors"].append(max(error(flat(mine), flat(alone)), abs(float(value / expected.detach()) - 1)))
        found["exchanges"].append(len(counted))
        found["through DDP"].append([*through])
    return found | {"size": adding.micro_batch.size}


def cut_then_short() -> list[int]:
    """How many texts DDP has seen, a pass each: of two steps of three texts a process, cut in two, and one of two texts."""
    mine, through = Texts(), []
    model = wrapped(mine, [])
    model.register_forward_pre_hook(lambda _, given: through.append(len(given[0])))
    adding = StepGradients(mine, model, micro_batch=2, device=torch.device("cpu"))
    for step, each in enumerate(([3, 3], [3, 3], [2, 2])):
        [one] = batches(step, [each])
        adding.add([share(*one, each)])
    return through


def _refuse(where: str, most: int, now: str, count: int) -> None:
    if where == now and count > most:
        raise torch.OutOfMemoryError("CUDA out of memory.")


EVEN, UNEVEN = [[4, 4]], [[6, 2], [0, 1]]
SMALL = {"without": 3, "with": 4, "backward": 4}  # a micro-batch with which memory runs out in that pass


def everything() -> dict[str, Any]:
    """In one of two processes."""
    own = {
        name: [own_loop(sizes, micro_batch, name) for sizes in SIZES[2] for micro_batch in (1, 3, 100)]
        for name in LOSSES
    }
    small = {where: steps(EVEN, size, where, most=1, at=1) for where, size in SMALL.items()}
    return {
        "own": own,
        "even": steps(EVEN, 8),
        "uneven": steps(UNEVEN, 8),
        "cut": steps(UNEVEN, 2),
        "small": small,
        "short": cut_then_short(),
    }


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], str]:
    """What two processes found, and what they printed."""
    folder = tmp_path_factory.mktemp("two")
    group = processes.start(everything, 2, folder)
    assert group.wait() == [0, 0], group.output()
    return group.results(), group.output()


def test_a_loop_of_ones_own_on_two_processes_has_the_gradients_of_one(two: tuple[list, str]) -> None:
    for result in two[0]:
        for name, found in result["own"].items():
            for gradient, value, _ in found:
                assert gradient <= 1e-6, name
                assert value <= 1e-6, name


def test_two_batches_are_exchanged_by_one_all_reduce(two: tuple[list, str]) -> None:
    assert {count for result in two[0] for found in result["own"].values() for *_, count in found} == {1}


@pytest.mark.parametrize("name", ["even", "uneven", "cut"])
def test_steps_on_two_processes_have_the_gradients_of_one(two: tuple[list, str], name: str) -> None:
    for result in two[0]:
        assert max(result[name]["errors"]) <= 1e-6
        assert result[name]["exchanges"] == [1] * 6


def test_ddp_exchanges_while_it_computes_once_as_many_tokens_have_fitted(two: tuple[list, str]) -> None:
    """The first step does not count, for the optimizer has no memory yet; step 3 has more tokens than any before."""
    for result in two[0]:
        assert result["even"]["through DDP"] == [[1], [1], [4], [1], [4], [4]]
        assert result["cut"]["through DDP"] == [[1]] * 6


def test_what_fitted_in_pieces_has_not_fitted_at_once(two: tuple[list, str]) -> None:
    """Two texts of a short batch run without DDP first, though three had as many tokens: these were run two and one."""
    for result in two[0]:
        assert result["short"] == [1, 1, 1]


@pytest.mark.parametrize("where", SMALL)
def test_one_process_without_memory_makes_both_begin_again(two: tuple[list, str], where: str) -> None:
    for result in two[0]:
        assert max(result["small"][where]["errors"]) <= 1e-6
        assert result["small"][where]["exchanges"] == [1] * 6
        assert result["small"][where]["size"] == 1


def test_one_process_says_so(two: tuple[list, str]) -> None:
    assert two[1].count("out of memory with 4 texts at once; on with 2") == 2
    assert two[1].count("out of memory with 3 texts at once; on with 1") == 1


@pytest.mark.parametrize("name", LOSSES)
def test_one_process(name: str) -> None:
    for micro_batch in (1, 3, 100):
        gradient, value, exchanges = own_loop(SIZES[1][0], micro_batch, name)
        assert (gradient <= 1e-6, value <= 1e-6, exchanges) == (True, True, 0)


@pytest.mark.parametrize("where", SMALL)
def test_one_process_begins_again(where: str, capsys: pytest.CaptureFixture) -> None:
    found = steps([[5], [3]], 4, where, most=1, at=1)
    assert max(found["errors"]) <= 1e-6
    assert (found["size"], found["exchanges"]) == (1, [0] * 6)
    assert capsys.readouterr().err.count("out of memory with") == 2


def test_memory_that_runs_out_in_the_exchange_ends_the_run_with_a_way_out() -> None:
    assert not gradients._cannot_be_undone(False)
    with pytest.raises(ResourceError, match=r"exchange gradients.*--train\.resume and a smaller --train\.micro-batch"):
        gradients._cannot_be_undone(True)
