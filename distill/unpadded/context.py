"""The way a model is run without padding, which a backward pass that runs layers again has to be told."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

Result = TypeVar("Result")


def as_here(function: Callable[..., Result]) -> Callable[..., Result]:
    """`function` as it runs here, wherever it is called: in a backward pass that computes activations again."""
    way = _current.get()

    def call(*inputs: Any, **options: Any) -> Result:
        if way is None or way is _current.get():
            return function(*inputs, **options)
        with entered(way):
            return function(*inputs, **options)

    return call


def current() -> AbstractContextManager[Any] | None:
    """The way that was entered last."""
    return _current.get()


@contextmanager
def entered(way: AbstractContextManager[Any]) -> Iterator[None]:
    """Inside `way`, which `as_here` enters again, later and from another thread."""
    token = _current.set(way)
    try:
        with way:
            yield
    finally:
        _current.reset(token)


_current: ContextVar[AbstractContextManager[Any] | None] = ContextVar("unpadded", default=None)
