"""The end of a run: what the student reached, on the screen, in report.json, on a page, and as a folder to use.

python -m distill.report RUN                 writes RUN/report.html anew
python -m distill.report RUN RUN... --output compare.html
"""

import argparse
import datetime
import json
import math
import sys
import textwrap
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from distill import distributed, files, page
from distill.errors import reported
from distill.evaluation import INDEX, MIXED, START, STUDENT, Scores, closeup_json, retention_json
from distill.export import Provenance, export, usage
from distill.gates import Gate, Verdict, enforce, judge
from distill.metrics import Interval
from distill.page.words import size_and_speed
from distill.students.summary import stored_bytes
from distill.training import Run

NOTHING = "nothing was measured: no text was held out (--held-out), and no evaluation data was given (--evaluation.*)"


def finish(run: Run, scores: Scores, provenance: Provenance, *, gates: Sequence[Gate] = ()) -> None:
    """Export OUTPUT/student, write OUTPUT/report.json and report.html, and print the table, what was kept, and how to use the student.

    At last the gates, a line each: GateMissed if one is missed.
    """
    verdicts = judge(gates, scores)
    distributed.main_first(partial(_publish, run, scores, provenance, verdicts))
    if distributed.is_main():
        print(summary(run, scores), flush=True)
    enforce(verdicts)


def summary(run: Run, scores: Scores) -> str:
    """The table, what the student keeps of the teacher's scores, what training gained, size and speed, and how to use it."""
    lines = [
        "",
        str(scores) if any(scores.table.values()) else NOTHING,
        "",
        *_line("among the training texts", [f"{count:,} {name}" for name, count in scores.seen_in_training.items()]),
        *_line("keeps of the teacher's scores", _shares(scores, STUDENT)),
        *_line("with the teacher's index, only queries by the student", _shares(scores, STUDENT + INDEX)),
        *_line("with an index half of whose documents the student added", _shares(scores, STUDENT + MIXED)),
        *_line("fidelity, further", _further(scores)),
        *_line("gained by training", [f"{metric} {_signed(gain)}" for metric, gain in gains(scores).items()]),
        *_line("against the teacher", _ratios(scores)),
        *(["", scores.stored_table(), ""] if scores.stored else []),
        *textwrap.wrap(_training(run), 120, subsequent_indent="    "),
        "",
        f"The student is in {run.output / 'student'}, all numbers are in {run.output / page.REPORT}, to look at in {run.output / page.PAGE}.",
        "To use it:",
        "",
        *("    " + line for line in usage(run.output / "student").splitlines()),
    ]
    return "\n".join(lines)


def gains(scores: Scores) -> dict[str, Interval]:
    """What training added to each score of the table that is compared row by row, with its paired interval."""
    table = scores.table.get(STUDENT, {})
    return {name: one.interval for name, one in scores.differences(STUDENT, START).items() if name in table}


def _shares(scores: Scores, system: str) -> list[str]:
    return [f"{metric} {share.value:.1%}" for metric, share in scores.kept(system).items()]


def _further(scores: Scores) -> list[str]:
    """The student's fidelity on all texts, as far as it stands in no table."""
    table = scores.table.get(STUDENT, {})
    whole = scores.slices[STUDENT][0].columns() if STUDENT in scores.slices else {}
    return [f"{metric} {score}" for metric, score in whole.items() if metric not in table]


def _ratios(scores: Scores) -> list[str]:
    ratios = size_and_speed(scores.speeds, STUDENT)
    if ratios is None:
        return []
    smaller, faster = ratios
    return [f"{smaller:,.1f}x fewer parameters", f"{faster:,.1f}x the texts/s on {distributed.device().type}"]


def _training(run: Run) -> str:
    padding = f"; {run.padding:.1%} padding" if run.padding is not None else ""
    return f"trained {run.steps:,} steps in {run.seconds:,.0f} s on {run.report}{padding}"


def _line(name: str, items: list[str]) -> list[str]:
    return textwrap.wrap(f"{name}: {', '.join(items)}", 120, subsequent_indent="    ") if items else []


def _signed(interval: Interval) -> str:
    return f"{interval.value:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"


def _publish(run: Run, scores: Scores, provenance: Provenance, verdicts: Sequence[Verdict]) -> None:
    export(run.student, run.output / "student", provenance=provenance, scores=scores)
    files.write_json(run.output / page.REPORT, _as_json(run, scores, provenance, verdicts))
    page.write_run(run.output)


def _as_json(run: Run, scores: Scores, provenance: Provenance, verdicts: Sequence[Verdict]) -> dict[str, Any]:
    training = {
        "steps": run.steps,
        "seconds": run.seconds,
        "texts_per_second": run.texts_per_second,
        "final_loss": run.final_loss if math.isfinite(run.final_loss) else None,
        "texts": run.report,
        **({"padding": run.padding} if run.padding is not None else {}),
    }
    student = {
        "name": run.student.name,
        "width": run.student.width,
        "parameters": run.student.parameter_count,
        "stored_bytes": stored_bytes(run.student),
    }
    return {
        **provenance.as_json(),
        "student": student,
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": distributed.device().type,
        **scores.as_json(),
        **retention_json(scores),
        "gains": {metric: gain.as_json() for metric, gain in gains(scores).items()},
        "gates": [verdict.as_json() for verdict in verdicts],
        "training": training,
        "settings": json.loads(json.dumps(run.settings, default=str)),
        "closeup": closeup_json(scores.closeups),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """python -m distill.report RUN [RUN...]: the page of a run anew, or several runs on one page."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.figures and len(options.run) > 1:
        parser.error("--figures are those of one run")
    return reported(partial(_write, options))


def _write(options: argparse.Namespace) -> int:
    if options.figures:
        written = page.write_figures(options.run[0], options.figures)
    elif len(options.run) == 1 and options.output is None:
        written = [page.write_run(options.run[0])]
    else:
        written = [page.write_comparison(options.run, options.output or Path("compare.html"))]
    print(*written, sep="\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m distill.report",
        description="Write the page of a run anew from its report.json, or compare several runs on one page.",
    )
    parser.add_argument("run", nargs="+", type=Path, help="folder of a run, or its report.json")
    parser.add_argument("--output", type=Path, help="page of several runs; by default compare.html")
    parser.add_argument(
        "--figures", type=Path, metavar="FOLDER", help="write the figures of one run as SVG files instead"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
