"""Pages as files: from the folders of runs to HTML, and to figures of their own."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distill import files, runlog
from distill.errors import DataError
from distill.export import usage
from distill.page.comparing import Entry, comparison, labels
from distill.page.rendering import figure_file
from distill.page.run import LEGEND, gallery, run_page

REPORT, PAGE = "report.json", "report.html"


def write_run(run: Path) -> Path:
    """RUN/report.html from RUN/report.json and RUN/metrics.jsonl; of a report of evaluate.py the page of its models."""
    report, folder = read_report(run), _folder(run)
    if "differences" in report:
        return write_models(folder, report)
    return _write(folder / PAGE, run_page(report, runlog.read(folder / runlog.NAME), usage(folder / "student")))


def write_models(folder: Path, report: dict[str, Any]) -> Path:
    """FOLDER/report.html: the models of a report of evaluate.py side by side."""
    models = [name for name in report["scores"] if name != "teacher" and " -> " not in name]
    entries = [
        Entry(label=label, report=report, system=name) for label, name in zip(labels(models), models, strict=True)
    ]
    title = f"{len(entries)} models on the same data" if len(entries) > 1 else "A model beside its teacher"
    return _write(
        folder / PAGE,
        comparison(entries, title=title, differences=report["differences"], gates=report.get("gates", [])),
    )


def write_comparison(runs: Sequence[Path], output: Path) -> Path:
    """Several runs on one page; DataError for a report of evaluate.py."""
    runs = list(dict.fromkeys(runs))
    names = labels([str(_folder(run)) for run in runs])
    entries = [Entry(label=name, report=_read_training(run)) for name, run in zip(names, runs, strict=True)]
    return _write(output, comparison(entries, title=f"{len(entries)} runs side by side"))


def write_figures(run: Path, folder: Path) -> list[Path]:
    """The figures of a run that stand on their own, as SVG files of FOLDER; DataError for a report of evaluate.py."""
    charts = gallery(_read_training(run))
    return [_write(folder / f"{name}.svg", figure_file(chart, LEGEND)) for name, chart in charts.items()]


def read_report(run: Path) -> dict[str, Any]:
    """The report.json of a run's folder; DataError if there is none, or it is not one."""
    path = _folder(run) / REPORT
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            f"{path} does not exist. Name the folder of a run that is done, which holds {REPORT}."
        ) from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path} is no JSON: {error}") from error
    if not isinstance(report, dict) or "scores" not in report:
        raise DataError(f"{path} is no report of a training run or of evaluate.py: it has no scores.")
    return report


def _read_training(run: Path) -> dict[str, Any]:
    report = read_report(run)
    if "differences" in report:
        raise DataError(
            f"{_folder(run) / REPORT} is a report of evaluate.py, which has a page of its own: {_folder(run) / PAGE}. "
            "Name runs of recipes that train a student."
        )
    return report


def _folder(run: Path) -> Path:
    return run.parent if run.name == REPORT else run


def _write(path: Path, text: str) -> Path:
    with files.published_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path
