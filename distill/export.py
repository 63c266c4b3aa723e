"""Hand a student over: a folder that SentenceTransformer(path) opens, with a model card that says what it is."""

import importlib.metadata
import json
import math
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill import distributed, files, folder
from distill.encoder import Encoder
from distill.evaluation import Scores
from distill.modules import StaticTable
from distill.narrow import NAME, Space, write_directions
from distill.quantized import INT8_MODULE
from distill.students.quantizing import TableCost, table_cost


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where a student comes from."""

    teacher: Encoder
    data: str
    loss: str
    command: str = ""
    space: Space | None = None
    """Given where `teacher` is one that was cut by `narrow`: its directions go into the folder."""

    def as_json(self) -> dict[str, Any]:
        return {
            "teacher": self.teacher.name,
            "teacher_commit": self.teacher.commit,
            "teacher_parameters": self.teacher.parameter_count,
            "teacher_fingerprint": self.teacher.fingerprint(),
            "data": self.data,
            "loss": self.loss,
            "command": self.command or this_command(),
            "versions": {name: _version(name) for name in ("distill", "torch", "transformers", "accelerate")},
        } | ({"space": self.space.as_json()} if self.space else {})


def export(
    student: Encoder,
    path: str | Path,
    *,
    provenance: Provenance,
    scores: Scores | None = None,
    license: str | None = None,
) -> Path:
    """Write `student` with README.md (the model card) and distill.json (provenance and scores). It appears whole or not at all.

    The folder opens in sentence-transformers 5.4 and later without remote code, but for an int8 table (`students.quantize`).
    A narrow student's holds the directions that turn an index, too. One process calls it.
    """
    path = Path(path)
    cost = _cost(student)
    record = provenance.as_json() | (scores.as_json() if scores else {}) | ({"table": cost.as_json()} if cost else {})
    files.recover(path)
    with files.published_folder(path) as temporary:
        folder.write(student.parts(), temporary)
        if provenance.space and provenance.space.directions is not None:
            write_directions(temporary / NAME, provenance.space.directions)
        card = _card(student, path, record, scores, license, provenance.space, cost)
        (temporary / "README.md").write_text(str(card), encoding="utf-8", errors="backslashreplace")
        (temporary / "distill.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return path


def usage(path: str | Path, *, int8: bool | None = None) -> str:
    """The three lines that use an exported student; whether its table is `int8` is read from its folder if it is not said."""
    modules = Path(path) / "modules.json"
    int8 = modules.exists() and INT8_MODULE in modules.read_text(encoding="utf-8") if int8 is None else int8
    trust = ", trust_remote_code=True" if int8 else ""
    return (
        "from sentence_transformers import SentenceTransformer\n"
        f'student = SentenceTransformer("{path}"{trust})\n'
        'vectors = student.encode(["a query for the index you already have"])'
    )


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # run from its folder
        return "not installed"


def this_command() -> str:
    """The command line of this program, as it can be typed again."""
    processes = distributed.world_size()
    launcher = ["python"] if processes == 1 else ["torchrun", "--nproc-per-node", str(processes)]
    return shlex.join([*launcher, *sys.argv])


def _cost(student: Encoder) -> TableCost | None:
    """What the form costs that a table is stored in, if it is not float32."""
    table = student.backbone
    return table_cost(student) if isinstance(table, StaticTable) and table.stored_as != "float32" else None


def _about_space(student: Encoder, space: Space | None) -> str:
    if space is None or space.kept is None:
        return (
            f"in the teacher's own vector space (width {student.width}): an index of the teacher's vectors stays, "
            "only the encoder is swapped."
        )
    return (
        f"in a narrower space: {space.kept}. An index of the teacher's vectors stays once it is turned "
        f"by `{NAME}`, which is in this folder: `python -m distill.narrow THIS_FOLDER --vectors index.npy --output narrow.npy`."
    )


def _about_table(cost: TableCost | None) -> str:
    if cost is None:
        return ""
    note = (
        " sentence-transformers opens it where distill is installed, from version 6 on with `trust_remote_code=True`: it has no "
        "module for int8 of its own. `Encoder.from_pretrained(FOLDER).save_pretrained(OTHER)` of distill writes it as float32."
    )
    return f"## Token table\n\nStored as {cost}.{note if cost.form == 'int8' else ''}"


def _card(
    student: Encoder,
    path: Path,
    record: dict[str, Any],
    scores: Scores | None,
    license: str | None,
    space: Space | None,
    cost: TableCost | None,
) -> Any:
    """The model card; its scores are those of the system called "student"."""
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    results = [
        EvalResult(
            task_type="feature-extraction",
            dataset_type="distill",
            dataset_name="evaluation",
            metric_type=metric,
            metric_value=round(score.interval.value, 4),
        )
        for metric, score in (scores.table.get("student", {}).items() if scores else ())
        if math.isfinite(score.interval.value)
    ]
    teacher = str(record["teacher"])
    data = ModelCardData(
        model_name=student.name,
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        tags=["sentence-transformers", "distill", "knowledge-distillation"],
        license=license,
        base_model=teacher if "/" in teacher and not Path(teacher).exists() else None,
        eval_results=results or None,
    )
    commit = f" at commit `{record['teacher_commit']}`" if record["teacher_commit"] else ""
    sections = [
        f"---\n{data.to_yaml()}\n---\n\n# {student.name}",
        f"A student of **{teacher}**{commit}, {_about_space(student, space)} "
        f"{student.parameter_count / 1e6:.1f}M parameters against the teacher's {record['teacher_parameters'] / 1e6:.1f}M.",
        f"## Use\n\n```python\n{usage(path, int8=bool(cost and cost.form == 'int8'))}\n```",
        _about_table(cost),
        f"## Scores\n\nEach with half the width of its bootstrap 95 % interval; `distill.json` has the bounds.\n\n```\n{scores}\n```"
        if scores
        else "",
        f"## How it was made\n\n- texts: {record['data']}\n- loss: {record['loss']}\n- command: `{record['command']}`\n"
        f"- versions: {', '.join(f'{name} {version}' for name, version in record['versions'].items())}",
    ]
    return ModelCard("\n\n".join(section for section in sections if section) + "\n")
