"""The end of a run: what the student reached, on the screen, in report.json, and as a folder to use."""

import json
from functools import partial
from typing import Any

from distill import distributed, files
from distill.evaluation import Scores
from distill.export import Provenance, export, usage
from distill.training import Run


def finish(run: Run, scores: Scores, provenance: Provenance) -> None:
    """Export OUTPUT/student, write OUTPUT/report.json, and print the table, what was kept, and how to use the student."""
    distributed.main_first(partial(_publish, run, scores, provenance))
    if distributed.is_main():
        print(summary(run, scores))


def summary(run: Run, scores: Scores) -> str:
    """The table with intervals, the share of each of the teacher's scores that is kept, size and speed, and three lines of code."""
    kept = [f"{metric} {share:.1%}" for metric, share in retention(scores, "student").items()]
    index = [f"{metric} {share:.1%}" for metric, share in retention(scores, "student -> teacher's index").items()]
    lines = [
        "",
        str(scores),
        "",
        *([f"keeps of the teacher: {', '.join(kept)}"] if kept else []),
        *([f"keeps with the teacher's index: {', '.join(index)}"] if index else []),
        *(f"{name}: {_size(speed)}" for name, speed in scores.speeds.items() if name in ("teacher", "student")),
        f"trained {run.steps} steps in {run.seconds:.0f} s, {run.texts_per_second:,.0f} texts/s, on {run.report}",
        "",
        f"the student, {run.output / 'student'}, and the report, {run.output / 'report.json'}, are written. To use it:",
        "",
        *("    " + line for line in usage(run.output / "student").splitlines()),
    ]
    return "\n".join(lines)


def retention(scores: Scores, system: str) -> dict[str, float]:
    """The share of each of the teacher's scores that a system keeps."""
    teacher, row = scores.table["teacher"], scores.table.get(system, {})
    return {
        metric: row[metric].interval.value / score.interval.value
        for metric, score in teacher.items()
        if metric in row and score.interval.value > 0
    }


def _publish(run: Run, scores: Scores, provenance: Provenance) -> None:
    export(run.student, run.output / "student", provenance=provenance, scores=scores)
    files.write_json(run.output / "report.json", _as_json(run, scores, provenance))


def _as_json(run: Run, scores: Scores, provenance: Provenance) -> dict[str, Any]:
    training = {
        "steps": run.steps,
        "seconds": run.seconds,
        "texts_per_second": run.texts_per_second,
        "final_loss": run.final_loss,
        "texts": run.report,
    }
    kept = {system: retention(scores, system) for system in scores.table if system != "teacher"}
    return {
        **provenance.as_json(),
        **scores.as_json(),
        "retention": kept,
        "training": training,
        "settings": json.loads(json.dumps(run.settings, default=str)),
    }


def _size(speed: dict[str, float]) -> str:
    return f"{speed['parameters'] / 1e6:.1f}M parameters, {speed['bytes'] / 1e6:.0f} MB, {speed['texts_per_second']:,.0f} texts/s"
