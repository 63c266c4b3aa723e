"""The table of what the sweeps did, at the end of a run; the sample or, with `-m slow`, all of it."""

from dataclasses import astuple
from pathlib import Path
from typing import Any

import counts
import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A whole sweep takes minutes on an idle machine, and more on a busy one."""
    for item in items:
        if item.get_closest_marker("slow") and item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.timeout(7200))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """A worker of pytest-xdist has ended, and hands over what it did."""
    for line in getattr(node, "workeroutput", {}).get("what the sweeps did", []):
        counts.note(*line)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["what the sweeps did"] = [astuple(line) for line in counts.LINES]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if lines := counts.table():
        terminalreporter.section("what the sweeps did")
        for line in lines:
            terminalreporter.line(line)


@pytest.fixture(params=[False, pytest.param(True, marks=pytest.mark.slow)], ids=["sample", "full"])
def full(request: pytest.FixtureRequest) -> bool:
    """Each sweep twice: a sample by default, and all of it among the slow tests."""
    return bool(request.param)
