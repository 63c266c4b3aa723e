"""Ctrl-C and SIGTERM: finish what is being done, then stop; a second one stops at once."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from distill import distributed
from distill.errors import Stopped


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """The signals that asked to stop, as they come. The second raises KeyboardInterrupt where the program stands."""
    seen: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        seen.append(number)
        if len(seen) > 1:
            raise KeyboardInterrupt

    try:
        before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: its owner handles signals
        before = {}
    try:
        yield seen
    except RuntimeError as error:
        if seen and distributed.lost_another(error):  # which the same signal ended
            raise Stopped("stopped; what was saved stays", 128 + seen[0]) from error
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
