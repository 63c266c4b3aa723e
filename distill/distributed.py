"""Several processes, one answer: N processes give the loss and the gradient that one process gives on the global batch.

DDP averages gradients over processes. Each process therefore computes the exact gradient of the global loss by its own
rows, times the number of processes. distill's losses do that from their share of the rows (`engine.sharing`), at one
N-th of the work; for any other loss each process computes the whole, with its own rows live and everybody else's as
constants. No collective runs backward either way.
"""

import gc
import inspect
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from distill.errors import ResourceError, Stopped
from distill.streaming import engine


def device() -> torch.device:
    """This process's device. The first call joins the other processes, if a launcher started any (accelerate launch, torchrun)."""
    from accelerate import PartialState

    # Left to itself, Accelerate has processes on CPUs join only under ACCELERATE_USE_CPU: else each would run alone, as rank 0.
    on_cpus = "true" in os.environ.get("ACCELERATE_USE_CPU", "").lower() or not torch.accelerator.is_available()
    if not on_cpus:
        _refuse_to_share(torch.accelerator.device_count())
    device = PartialState(cpu=on_cpus).device
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size() != launched:
        raise ResourceError(
            f"the launcher started {launched} processes and {world_size()} joined: something used Accelerate before distill "
            "did. Call distill.distributed.device() first."
        )
    return device


def _refuse_to_share(devices: int) -> None:
    """ResourceError if a machine's processes are more than its devices. A launcher may show each process one, its own."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if here > devices and not (devices == 1 and "CUDA_VISIBLE_DEVICES" in os.environ):
        raise ResourceError(
            f"{here} processes on {devices} device{'s' * (devices > 1)}: start one process a device, {devices} on each machine, or leave "
            "the devices alone with ACCELERATE_USE_CPU=true."
        )


def use_all_cores() -> None:
    """Give a lone process on a CPU all its cores under `accelerate launch`, which sets OMP_NUM_THREADS=1 if nobody sets it.

    A number of threads other than 1 was chosen by somebody and stays.
    """
    by_accelerate = "ACCELERATE_MIXED_PRECISION" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1"
    if by_accelerate and world_size() == 1 and device().type == "cpu":
        torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def gather_objects(value: Any) -> list[Any]:
    """One value of each process, in rank order, on every process."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def agree(value: Any) -> Any:
    """The main process's value, on every process."""
    if world_size() == 1:
        return value
    box = [value if is_main() else None]
    dist.broadcast_object_list(box, src=0)
    return box[0]


@torch.no_grad()
def give_to_all(tensors: Iterable[Tensor]) -> None:
    """Write the main process's values over everybody's: what was drawn at random differs between processes."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor.data, src=0)


def main_first(action: Callable[[], Any]) -> Any:
    """Run `action` on the main process and hand its result to all. What it raises is raised on every process."""
    result, error = _attempt(action) if is_main() else (None, None)
    with _own_error_first(error):
        value, raised = agree((result, _portable(error)))
    _raise(error or raised)
    return value


def everywhere(action: Callable[[], Any]) -> list[Any]:
    """Run `action` on every process; its results in rank order. If it raises on one, all raise: nobody waits for the lost one."""
    result, error = _attempt(action)
    with _own_error_first(error):
        outcomes = gather_objects((result, _portable(error)))
    _raise(error or next((other for _, other in outcomes if other), None))
    return [value for value, _ in outcomes]


def any_process(flag: bool, device: torch.device | None = None) -> bool:
    """True everywhere if it is true anywhere."""
    return any_process_each([flag], device)[0]


def any_process_each(flags: Sequence[bool], device: torch.device | None = None) -> list[bool]:
    """`any_process` of each of the flags, in one exchange."""
    if world_size() == 1:
        return list(flags)
    votes = torch.tensor(flags, dtype=torch.float32, device=device)
    dist.all_reduce(votes, op=dist.ReduceOp.MAX)
    return [vote > 0 for vote in votes.tolist()]


def share(count: int) -> range:
    """This process's contiguous share of `count` rows; shares differ by at most one row."""
    return range(rank() * count // world_size(), (rank() + 1) * count // world_size())


def gather_rows(rows: Shaped[Tensor, "b *d"], sizes: Sequence[int] | None = None) -> Shaped[Tensor, "g *d"]:
    """Rows of all processes in rank order, without gradient. Cost: one all-gather, padded to the largest.

    Sizes may differ; if they are not given they are gathered first.
    """
    if world_size() == 1:
        return rows.detach()
    return engine.gather_rows(rows, _sizes(rows) if sizes is None else sizes)


@torch._disable_dynamo  # as torch.compiler.disable, which would import dynamo with this module: 1.5 s
def global_loss(
    loss: Callable[..., Float[Tensor, ""]],
    student: Float[Tensor, "b d"],
    teacher: Float[Tensor, "b e"],
    *,
    bank: Float[Tensor, "n e"] | None = None,
    keys: Int[Tensor, " b"] | None = None,
    bank_keys: Int[Tensor, " n"] | None = None,
) -> Float[Tensor, ""]:
    """The loss of the global batch; after DDP's averaging its gradient is the single-process one. Sizes may differ per process.

    `bank` and `bank_keys` must be the same on every process. They, and `keys`, go to losses that have `uses_bank`.
    A loss that has `runs_on_shares`, as distill's have, does its share of the work and exchanges what its family needs:
    teacher rows (cross), d x d moments or student rows (relational). Any other costs an all-gather of both sides and the
    loss of all rows on every process.
    """
    columns: dict[str, Tensor | None] = {}
    untold = keys is not None and not hasattr(loss, "uses_bank") and _takes_keys(loss)
    lost = "a bank" if bank is not None else "keys" if untold else None
    if lost and not getattr(loss, "uses_bank", False):
        raise ValueError(
            f"global_loss got {lost} for {getattr(loss, '__name__', type(loss).__name__)}, which has no `uses_bank`. Give "
            "the Module of a loss that takes one: CrossKL(), not cross_kl; a Module of your own says uses_bank = True."
        )
    if getattr(loss, "uses_bank", False):
        columns = {"bank": bank, "keys": keys, "bank_keys": bank_keys}
    if world_size() == 1:
        return loss(student, teacher, **columns)
    sizes = _sizes(student)
    if getattr(loss, "runs_on_shares", False):
        with engine.sharing(engine.Share(sizes, rank())):
            value = loss(student, teacher, **columns)
    else:
        if keys is not None and "keys" in columns:
            columns["keys"] = gather_rows(keys, sizes)
        everyone = list(gather_rows(student, sizes).split(sizes))
        everyone[rank()] = student
        value = loss(torch.cat(everyone), gather_rows(teacher, sizes), **columns)
    value = value.clone()  # with a hook on what is returned alone
    if value.requires_grad:
        value.register_hook(lambda gradient: world_size() * gradient)
    return value


def _attempt(action: Callable[[], Any]) -> tuple[Any, BaseException | None]:
    try:
        return action(), None
    except (Exception, Stopped) as error:
        return None, error


@contextmanager
def _own_error_first(error: BaseException | None) -> Iterator[None]:
    """If the others cannot be told of an error because they are gone (one Ctrl-C ends all), it is still what is raised here."""
    try:
        yield
    except RuntimeError as lost:
        if error and lost_another(lost):
            raise error from lost
        raise


def _raise(error: BaseException | None) -> None:
    if error:
        raise error


def _portable(error: BaseException | None) -> BaseException | None:
    """What other processes can be told: an exception of a library may not survive the journey."""
    if error is None or type(error).__module__ in ("builtins", "distill.errors"):
        return error
    return RuntimeError(f"{type(error).__name__}: {error}")


def lost_another(error: RuntimeError) -> bool:
    """Whether an error of a collective means that a process at its other end is gone."""
    signs = ("closed by peer", "reset by peer", "Broken pipe", "remote process exited", "Connection refused")
    return world_size() > 1 and any(sign in str(error) for sign in signs)


def _takes_keys(loss: Callable[..., object]) -> bool:
    try:
        return "keys" in inspect.signature(getattr(loss, "forward", loss)).parameters
    except (TypeError, ValueError):  # some of torch's own functions do not tell
        return False


def _sizes(rows: Tensor) -> list[int]:
    """Of all processes. Rows of another dtype or shape would be read as other numbers, or never arrive."""
    kind = zlib.crc32(repr((rows.dtype, rows.shape[1:])).encode())
    mine = torch.tensor([len(rows), kind], device=rows.device)
    everyone = [torch.empty_like(mine) for _ in range(world_size())]
    dist.all_gather(everyone, mine)
    sizes, kinds = torch.stack(everyone).T.tolist()
    if len(set(kinds)) > 1:
        raise ValueError(
            f"processes share rows of one dtype and width, got {rows.dtype} {tuple(rows.shape)} on process {rank()} and "
            "something else on another. Run the same model in the same precision on all."
        )
    return sizes


def finish() -> None:
    """Leave the group of processes, if there is one, and end its threads."""
    if dist.is_initialized():
        dist.destroy_process_group()
        gc.collect()  # a traceback in a cycle may hold it


def hides_bars() -> bool | None:
    """tqdm's `disable`: None, a bar on a terminal only, on the main process; True on the others."""
    return None if is_main() else True
