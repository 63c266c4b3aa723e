"""The end of a run: what the student reached, on the screen, in report.json, and as a folder to use."""

import json
import math
import textwrap
from functools import partial
from typing import Any

from distill import distributed, files
from distill.evaluation import Scores
from distill.export import Provenance, export, usage
from distill.metrics import Interval
from distill.training import Run

STUDENT, START = "student", "untrained start"
INDEX, MIXED = "student -> teacher's index", "student -> mixed index"


def finish(run: Run, scores: Scores, provenance: Provenance) -> None:
    """Export OUTPUT/student, write OUTPUT/report.json, and print the table, what was kept, and how to use the student."""
    distributed.main_first(partial(_publish, run, scores, provenance))
    if distributed.is_main():
        print(summary(run, scores), flush=True)


def summary(run: Run, scores: Scores) -> str:
    """The table, what the student keeps of the teacher's scores, what training gained, size and speed, and how to use it."""
    lines = [
        "",
        str(scores),
        "",
        *_line("keeps of the teacher's scores", _shares(scores, STUDENT)),
        *_line("with the teacher's index, only queries by the student", _shares(scores, INDEX)),
        *_line("with an index half of whose documents the student added", _shares(scores, MIXED)),
        *_line("fidelity, further", _further(scores)),
        *_line("gained by training", [f"{metric} {_signed(gain)}" for metric, gain in gains(scores).items()]),
        *_line("against the teacher", _ratios(scores)),
        f"trained {run.steps:,} steps in {run.seconds:,.0f} s on {run.report}",
        "",
        f"The student is in {run.output / 'student'}, all numbers are in {run.output / 'report.json'}. To use it:",
        "",
        *("    " + line for line in usage(run.output / "student").splitlines()),
    ]
    return "\n".join(lines)


def retention(scores: Scores, system: str) -> dict[str, float]:
    """The share of each of the teacher's scores that a system keeps."""
    teacher, row = scores.table["teacher"], scores.table.get(system, {})
    shares = {
        metric: row[metric].interval.value / score.interval.value
        for metric, score in teacher.items()
        if metric in row and score.interval.value > 0
    }
    return {metric: share for metric, share in shares.items() if math.isfinite(share)}


def gains(scores: Scores) -> dict[str, Interval]:
    """What training added to each score of the table that is compared row by row, with its paired interval."""
    table = scores.table.get(STUDENT, {})
    return {name: one.interval for name, one in scores.differences(STUDENT, START).items() if name in table}


def _shares(scores: Scores, system: str) -> list[str]:
    return [f"{metric} {share:.1%}" for metric, share in retention(scores, system).items()]


def _further(scores: Scores) -> list[str]:
    """The student's fidelity on all texts, as far as it stands in no table."""
    table = scores.table.get(STUDENT, {})
    whole = scores.slices[STUDENT][0].columns() if STUDENT in scores.slices else {}
    return [f"{metric} {score}" for metric, score in whole.items() if metric not in table]


def _ratios(scores: Scores) -> list[str]:
    teacher, student = scores.speeds.get("teacher"), scores.speeds.get(STUDENT)
    if teacher is None or student is None:
        return []
    smaller = teacher["parameters"] / student["parameters"]
    faster = student["texts_per_second"] / max(teacher["texts_per_second"], 1e-9)
    return [f"{smaller:,.1f}x fewer parameters", f"{faster:,.1f}x the texts/s on {distributed.device().type}"]


def _line(name: str, items: list[str]) -> list[str]:
    return textwrap.wrap(f"{name}: {', '.join(items)}", 120, subsequent_indent="    ") if items else []


def _signed(interval: Interval) -> str:
    return f"{interval.value:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"


def _publish(run: Run, scores: Scores, provenance: Provenance) -> None:
    export(run.student, run.output / "student", provenance=provenance, scores=scores)
    files.write_json(run.output / "report.json", _as_json(run, scores, provenance))


def _as_json(run: Run, scores: Scores, provenance: Provenance) -> dict[str, Any]:
    training = {
        "steps": run.steps,
        "seconds": run.seconds,
        "texts_per_second": run.texts_per_second,
        "final_loss": run.final_loss if math.isfinite(run.final_loss) else None,
        "texts": run.report,
    }
    return {
        **provenance.as_json(),
        **scores.as_json(),
        "retention": {system: retention(scores, system) for system in scores.table if system != "teacher"},
        "gains": {metric: vars(gain) for metric, gain in gains(scores).items()},
        "training": training,
        "settings": json.loads(json.dumps(run.settings, default=str)),
    }
