"""The table of what the sweeps did, at the end of a run; the sample or, with `-m slow`, all of it."""

from typing import Any

import counts
import pytest


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if lines := counts.table():
        terminalreporter.section("what the sweeps did")
        for line in lines:
            terminalreporter.line(line)


@pytest.fixture(params=[False, pytest.param(True, marks=pytest.mark.slow)], ids=["sample", "full"])
def full(request: pytest.FixtureRequest) -> bool:
    """Each sweep twice: a sample by default, and all of it among the slow tests."""
    return bool(request.param)
