"""The model card: what a student is, how to use it, and what it reached, as people and the Hub read it."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill import hub
from distill.encoder import Encoder
from distill.errors import DistillError
from distill.evaluation import INDEX, STUDENT, Scores
from distill.evaluation.fidelity import is_headline
from distill.evaluation.scores import Score
from distill.export.provenance import Provenance
from distill.folder import SETTINGS, read_json
from distill.modules import Dense, StaticTable
from distill.narrow import NAME
from distill.quantized import INT8_MODULE
from distill.space import Space
from distill.students.quantizing import TableCost

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCard

MADE = "How it was made"
# What a metric of the table is called on the Hub: the task, and the metric's identifier as sentence-transformers writes it.
_TASKS = {
    "spearman": ("semantic-similarity", "Semantic Similarity", "spearman_cosine"),
    "ndcg@10": ("information-retrieval", "Information Retrieval", "cosine_ndcg@10"),
    "recall@10": ("information-retrieval", "Information Retrieval", "cosine_recall@10"),
    "accuracy": ("text-classification", "Text Classification", "accuracy"),
}
_FIDELITY = ("knowledge-distillation", "Knowledge Distillation")
# What sentence-transformers makes of a table, by its form. Its normalisation adds 1e-12, which is 0 in float16.
_OPENED = {
    "float16": " sentence-transformers opens it in float16, where a text without tokens (an empty one) is a vector of NaN; "
    "`SentenceTransformer(FOLDER).float()` computes in float32, and it is zeros.",
    "int8": " sentence-transformers opens it where distill is installed, from version 6 on with `trust_remote_code=True`: it has no "
    "module for int8 of its own. `Encoder.from_pretrained(FOLDER).save_pretrained(OTHER)` of distill writes it as float32.",
}


def model_card(
    student: Encoder,
    path: Path,
    provenance: Provenance,
    record: dict[str, Any],
    *,
    scores: Scores | None,
    license: str | None,
    cost: TableCost | None,
) -> "ModelCard":
    """The card of the student that is written to `path`; its scores are those of the system called "student"."""
    from huggingface_hub import ModelCard, ModelCardData

    teacher = str(record["teacher"])
    names: dict[str, Any] = {"license": license} if license else {**_license(provenance.teacher)}
    data = ModelCardData(
        model_name=student.name,
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        tags=["sentence-transformers", "feature-extraction", "distill", "knowledge-distillation"],
        base_model=teacher if "/" in teacher and not Path(teacher).exists() else None,
        eval_results=[*_results(scores)] or None if scores else None,
        **names,
    )
    commit = f" at commit `{record['teacher_commit']}`" if record["teacher_commit"] else ""
    sections = [
        f"---\n{data.to_yaml()}\n---\n\n# {student.name}",
        f"A student of **{teacher}**{commit}, {_about_space(student, provenance.space)} "
        f"{student.parameter_count / 1e6:.1f}M parameters against the teacher's {record['teacher_parameters'] / 1e6:.1f}M.",
        f"## Use\n\n```python\n{usage(path, int8=bool(cost and cost.form == 'int8'), prompts=student.prompts)}\n```",
        _about_loaders(student),
        _about_table(cost),
        f"## Scores\n\nEach with half the width of its bootstrap 95 % interval; `distill.json` has the bounds.\n\n```\n{scores}\n```"
        if scores
        else "",
        f"## {MADE}\n\n- texts: {record['data']}\n- loss: {record['loss']}\n- command: `{record['command']}`\n"
        f"- versions: {', '.join(f'{name} {version}' for name, version in record['versions'].items())}",
    ]
    return ModelCard("\n\n".join(section for section in sections if section) + "\n")


def usage(path: str | Path, *, int8: bool | None = None, prompts: Mapping[str, str] | None = None) -> str:
    """The lines that use an exported student, by role where one has a prompt, which `encode` would leave out.

    Whether its table is `int8`, and its prompts, are read from its folder if they are not said.
    """
    modules = Path(path) / "modules.json"
    int8 = modules.exists() and INT8_MODULE in modules.read_text(encoding="utf-8") if int8 is None else int8
    prompts = read_json(Path(path) / SETTINGS, {}).get("prompts") or {} if prompts is None else prompts
    trust = ", trust_remote_code=True" if int8 else ""
    opened = f'from sentence_transformers import SentenceTransformer\nstudent = SentenceTransformer("{path}"{trust})\n'
    query = '["a query for the index you already have"]'
    if prompts.get("query") or prompts.get("document"):
        return (
            opened + f'vectors = student.encode_query({query})\nadded = student.encode_document(["a document to add"])'
        )
    return opened + f"vectors = student.encode({query})"


def with_section(card: str, title: str, body: str) -> str:
    """A card's text with this section: in the place of one of the same title, else before how it was made, else at the end."""
    section, heading = f"## {title}\n\n{body.strip()}\n", f"## {title}\n"
    before, found, old = card.partition(heading)
    if found:
        rest = old.partition("\n## ")
        return before + section + rest[1] + rest[2]
    before, found, rest_of_card = card.partition(f"## {MADE}\n")
    return f"{before.rstrip()}\n\n{section}" + (f"\n{found}{rest_of_card}" if found else "")


def _results(scores: Scores) -> "Iterator[EvalResult]":
    """The student's scores, and those of its queries against the teacher's index, as a model-index."""
    for system, index in ((STUDENT, None), (STUDENT + INDEX, "teacher's index")):
        for name, score in scores.table.get(system, {}).items():
            if math.isfinite(score.interval.value):  # YAML's .nan is refused by the Hub
                yield _result(name, score, index)


def _result(name: str, score: Score, index: str | None) -> "EvalResult":
    from huggingface_hub import EvalResult

    dataset, _, metric = ("", "", name) if is_headline(name) else name.rpartition(" ")
    kind, title, identifier = _TASKS[metric] if metric in _TASKS else (*_FIDELITY, metric.replace(" ", "_"))
    data = dataset or "held-out"
    return EvalResult(
        task_type=kind,
        task_name=title,
        dataset_type=data,
        dataset_name=data.replace("held-out", "held-out texts") + (f", {index}" if index else ""),
        dataset_config=index,
        metric_type=identifier,
        metric_name=metric,
        metric_value=round(score.interval.value, 4),
    )


def _license(teacher: Encoder) -> dict[str, str]:
    """What the teacher's own card says of its licence; nothing where it has no card on this machine."""
    from huggingface_hub import ModelCard

    try:
        readme = hub.resolve_model(teacher.name, revision=teacher.commit, offline=True).path / "README.md"
        data = ModelCard.load(readme).data.to_dict() if readme.exists() else {}
    except (DistillError, ValueError):  # no folder of that name any more; a card whose head is no YAML
        return {}
    fields = ("license", "license_name", "license_link")
    return {field: data[field] for field in fields if isinstance(data.get(field), str)}


def _about_space(student: Encoder, space: Space | None) -> str:
    if space and space.several:
        stays = "in the first one's own vector space: an index of its vectors stays, only the encoder is swapped"
        made = "in a space of its own: an index is made by the student itself, or by all teachers joined as they were"
        return f"of the {space.several}, {stays if space.several.keeps_index else made} (width {student.width})."
    if space is None or space.kept is None:
        return (
            f"in the teacher's own vector space (width {student.width}): an index of the teacher's vectors stays, "
            "only the encoder is swapped."
        )
    return (
        f"in a narrower space: {space.kept}. An index of the teacher's vectors stays once it is turned "
        f"by `{NAME}`, which is in this folder: `python -m distill.narrow THIS_FOLDER --vectors index.npy --output narrow.npy`."
    )


def _about_loaders(student: Encoder) -> str:
    if not isinstance(student.backbone, StaticTable) or not any(isinstance(layer, Dense) for layer in student.head):
        return ""
    return (
        "Open it with `SentenceTransformer`, as above, or distill's `Encoder.from_pretrained`. model2vec's `StaticModel` reads the "
        "token table and leaves out the Dense layer behind it, without a word: its vectors are in another space."
    )


def _about_table(cost: TableCost | None) -> str:
    if cost is None:
        return ""
    return f"## Token table\n\nStored as {cost}.{_OPENED[cost.form]}"
