"""Write a student's folder: the model, its card, and where it comes from."""

import json
from pathlib import Path

from distill import files, folder
from distill.encoder import Encoder
from distill.evaluation import Scores
from distill.export.card import model_card
from distill.export.provenance import Provenance
from distill.modules import StaticTable
from distill.narrow import NAME, write_directions
from distill.students.quantizing import TableCost, table_cost


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
    It takes the place of an earlier model's folder, of all files in it; RecipeError if `path` holds something else.
    A narrow student's holds the directions that turn an index, too. `license` is the teacher's, if its card names one and
    no other is given. One process calls it.
    """
    path = Path(path)
    files.recover(path)
    folder.refuse_other_files(path)
    cost = _cost(student)
    record = provenance.as_json() | (scores.as_json() if scores else {}) | ({"table": cost.as_json()} if cost else {})
    with files.published_folder(path) as temporary:
        folder.write(student.parts(), temporary)
        if provenance.space and provenance.space.directions is not None:
            write_directions(temporary / NAME, provenance.space.directions)
        card = model_card(student, path, provenance, record, scores=scores, license=license, cost=cost)
        (temporary / "README.md").write_text(str(card), encoding="utf-8", errors="backslashreplace")
        (temporary / "distill.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return path


def _cost(student: Encoder) -> TableCost | None:
    """What the form costs that a table is stored in, if it is not float32."""
    table = student.backbone
    return table_cost(student) if isinstance(table, StaticTable) and table.stored_as != "float32" else None
