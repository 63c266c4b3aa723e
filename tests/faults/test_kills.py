"""SIGKILL, Ctrl-C and SIGTERM at random instants of six phases, one process and two: resumed, the bits of a run that was never stopped."""

import signal
from pathlib import Path

import counts
import pipeline
import processes
import pytest


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("kind", ["kill", "stop"])
def test_a_run_stopped_at_any_instant_goes_on_to_the_same_bits(
    kind: str, world: int, tiny_bert: Path, tmp_path: Path, full: bool
) -> None:
    signals = [signal.SIGKILL] if kind == "kill" else [signal.SIGINT, signal.SIGTERM]
    count = max(2, counts.amount("kills", full) // (2 if kind == "kill" else 4))
    arguments = {"world": world, "count": count, "signals": [int(one) for one in signals], "seed": world}
    [found] = processes.run(
        pipeline.kills,
        1,
        tmp_path,
        model=tiny_bert,
        folder=tmp_path,
        timeout_seconds=40_000 if full else 800,
        **arguments,
    )
    name = "SIGKILL" if kind == "kill" else "SIGINT, SIGTERM"
    for phase, done in found["done"].items():
        counts.note(1, f"{name} in {phase}, {world} processes", done)
    counts.note(1, f"{name}, what was not as promised, {world} processes", 0, len(found["wrong"]))
    assert found["wrong"] == [], "\n".join(found["wrong"][:3])
    assert sum(found["done"].values()) >= count
