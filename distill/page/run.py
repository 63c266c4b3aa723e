"""The page of one run: what its report says, section by section."""

from collections.abc import Mapping, Sequence
from typing import Any

from distill.evaluation import INDEX, START, STUDENT
from distill.page import figures, words
from distill.page.charts import Matrices, Number, Rows
from distill.page.rendering import rendered
from distill.page.words import Report, Score, known

Pairs = list[tuple[str, str]]
LEGEND = [("student", "student"), ("start", "untrained start")]
IN_THE_SPACE = (
    "In the teacher’s own vector space: an index of the teacher’s vectors stays, and only the encoder is swapped."
)
IN_FEWER = (
    "In fewer numbers than the teacher’s: an index is turned once by the directions in the student’s folder, with "
    "python -m distill.narrow STUDENT --vectors index.npy --output narrow.npy."
)


OF_ITS_OWN = "In a space of its own, of several teachers: an index is made by the student itself, or by all of its teachers joined as they were."


def run_page(report: Report, steps: Sequence[Mapping[str, Any]], usage: str) -> str:
    """HTML of a run from its report.json, the lines of its metrics.jsonl, and the code that uses its student."""
    drawn = {name: getattr(figures, name)(report) for name in ("retention", "fidelity", "matrices", "size")}
    systems, table = scores_table(report)
    return rendered(
        "run.html",
        title=f"{student_name(report)}, a student of {report.get('teacher', 'its teacher')}",
        student=student_name(report),
        teacher=report.get("teacher", "its teacher"),
        verdict=words.verdict(report),
        keys=key_numbers(report),
        gates=report.get("gates", []),
        systems=systems,
        table=table,
        whose=LEGEND if START in report.get("scores", {}) else LEGEND[:1],
        length=figures.by_length(report),
        margin=figures.by_margin(report),
        texts=_texts(report),
        worst=report.get("closeup", {}).get("worst", {}).get(STUDENT, []),
        loss=figures.loss(steps),
        rate=figures.rate(steps),
        training=_training(report),
        gains=[(metric, words.signed(gain)) for metric, gain in report.get("gains", {}).items()],
        device=f" on {device.upper()}" if (device := report.get("device")) else "",
        stored=_stored(report),
        space=_space(report.get("space")),
        usage=usage,
        facts=_facts(report),
        command=report.get("command", ""),
        more=[
            ("Teacher’s fingerprint", _pairs(report.get("teacher_fingerprint"))),
            ("Settings", _pairs(report.get("settings"))),
        ],
        **drawn,
    )


def _space(space: Mapping[str, Any] | None) -> str:
    if space and "teachers" in space:
        return IN_THE_SPACE if space["method"] == "procrustes" else OF_ITS_OWN
    return IN_FEWER if space else IN_THE_SPACE


def gallery(report: Report) -> dict[str, Rows | Matrices]:
    """The figures that stand on their own as files."""
    found = {
        "retention": figures.retention(report),
        "fidelity": figures.fidelity(report),
        "matrix": figures.matrices(report),
    }
    return {name: chart for name, chart in found.items() if chart is not None}


def student_name(report: Report) -> str:
    """Its name; reports of before they held it have the teacher's alone."""
    return (
        report.get("student", {}).get("name") or f"A student of {words.short_name(report.get('teacher', 'a teacher'))}"
    )


def key_numbers(report: Report) -> list[tuple[str, str, str]]:
    """What, value, and its interval or what it is a share of: five numbers at most."""
    found: list[tuple[str, str, str]] = []
    for system, where in ((STUDENT + INDEX, ", teacher’s index"), (STUDENT, "")):
        if kept := words.headline(words.kept(report, system)):
            metric, one = next(iter(kept.items()))
            found.append((f"keeps of {metric}{where}", words.percent(one["value"]), _half(one, 100, 1)))
            break
    row = report.get("scores", {}).get(STUDENT, {})
    for metric in ("cosine to teacher", "neighbour overlap@10"):
        if metric in row:
            found.append((metric, words.number(row[metric]["value"]), _half(row[metric], 1, 3)))
    if ratios := words.size_and_speed(report.get("speed", {}), STUDENT):
        speed = report["speed"][STUDENT]
        found.append(("fewer parameters", f"{words.times(ratios[0])}×", words.amount(speed["parameters"])))
        found.append(("more texts a second", f"{words.times(ratios[1])}×", f"{speed['texts_per_second']:,.0f}/s"))
    return found


def scores_table(report: Report) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Systems across, metrics down."""
    scores: Mapping[str, Mapping[str, Score]] = report.get("scores", {})
    metrics = dict.fromkeys(metric for row in scores.values() for metric in row)
    table = [
        (metric, [words.score(row[metric]) if metric in row else "" for row in scores.values()]) for metric in metrics
    ]
    return [name.replace("->", "→") for name in scores], table


def _half(one: Score, factor: Number, digits: int) -> str:
    return f"±{factor * (one['high'] - one['low']) / 2:.{digits}f}" if known(one) else ""  # type: ignore[operator]


def _texts(report: Report) -> str:
    parts = report.get("fidelity", {}).get(STUDENT, [])
    return f"{parts[0]['texts']:,}" if parts else ""


def _training(report: Report) -> str:
    """What was done."""
    training = report.get("training")
    if not training:
        return ""
    speed = f"{training['texts_per_second']:,.0f} texts/s"
    return f"{training['steps']:,} steps in {words.seconds(training['seconds'])}, {speed}, on {training['texts']}."


def _stored(report: Report) -> str:
    size = report.get("student", {}).get("stored_bytes")
    return f" The student’s weights take {size / 1e6:,.1f} MB." if size else ""


def _facts(report: Report) -> Pairs:
    versions = ", ".join(f"{name} {version}" for name, version in report.get("versions", {}).items())
    facts = {
        "teacher": report.get("teacher"),
        "teacher’s commit": report.get("teacher_commit"),
        "student": _about(report.get("student", {})),
        "texts": report.get("data"),
        "scored on": "; ".join(f"{name}: {source}" for name, source in report.get("scored_on", {}).items()),
        "among the training texts": ", ".join(
            f"{count:,} {name}" for name, count in report.get("seen_in_training", {}).items()
        ),
        "loss": report.get("loss"),
        "finished": report.get("finished", "").replace("T", " ").replace("+00:00", " UTC"),
        "versions": versions,
    }
    return [(name, str(value)) for name, value in facts.items() if value]


def _about(student: Mapping[str, Any]) -> str:
    if not student:
        return ""
    return f"{student['name']}, {student['parameters']:,} parameters, vectors of width {student['width']}"


def _pairs(values: Mapping[str, Any] | None) -> Pairs:
    return [(name.replace("_", " "), str(value)) for name, value in (values or {}).items()]
