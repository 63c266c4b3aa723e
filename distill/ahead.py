"""Work done ahead of its use: reading and tokenizing, in a thread, let other threads run while a device computes; so do copies to it."""

from collections.abc import Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")
_END = object()


def ahead(items: Iterable[Item]) -> Generator[Item, None, None]:
    """The items, in their order, each made while the one before is used. What making one raises is raised in its place.

    Where the caller stops early, one item more than it took has been made.
    """
    iterator = iter(items)
    with ThreadPoolExecutor(1) as worker:
        following = worker.submit(next, iterator, _END)
        while (item := following.result()) is not _END:
            following = worker.submit(next, iterator, _END)
            yield item  # type: ignore[misc]


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`. To CUDA the host does not wait: torch's plain copy would, for all that is queued there."""
    return tensor.to(device, non_blocking=device.type == "cuda")
