"""MTEB, as an extra: its named tasks run on any encoder; and what was measured on our own files, in the form of its results.

Both lie as its own results do, FOLDER/results/MODEL/REVISION/TASK.json: `mteb.ResultCache(FOLDER)` reads them.
"""

import difflib
import importlib.util
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from distill import distributed, files, hub, hub_errors
from distill.encoder import Encoder
from distill.errors import RecipeError, ResourceError
from distill.evaluation.scores import Score, Scores
from distill.evaluation.systems import EvaluationData
from distill.similarity import cosine_similarity_matrix, pairwise_cosine

LANGUAGE = "und-Zyyy"  # ISO 639 and 15924 for a language and a script that nobody has named
# Our metrics by the names of MTEB, the main one of its task type first.
_NAMES = {
    "spearman": ("cosine_spearman", "spearman"),
    "ndcg@10": ("ndcg_at_10",),
    "recall@10": ("recall_at_10",),
    "accuracy": ("accuracy",),
}


class MtebEncoder:
    """An encoder as `mteb.evaluate` takes it: the prompt is that of the task's role, query or document; likeness is the cosine.

    Its name is ORG/NAME, that of a folder its last two parts; its revision the commit, or `revision`'s digest.
    """

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder

    @property
    def mteb_model_meta(self) -> Any:
        from mteb.models import ModelMeta

        encoder = self.encoder
        known: dict[str, Any] = {"name": model_name(encoder), "revision": revision(encoder)}
        sizes = {"n_parameters": encoder.parameter_count, "embed_dim": encoder.width, "max_tokens": encoder.max_length}
        return ModelMeta.create_empty(overwrites={**known, **sizes, "framework": ["PyTorch"]})

    def encode(self, inputs: Any, *, prompt_type: Any = None, **_: Any) -> Float[Tensor, "n d"]:
        """`inputs` are batches with a list "text"; what else MTEB tells, of the task, is not asked."""
        texts = [text for batch in inputs for text in batch["text"]]
        role = getattr(prompt_type, "value", prompt_type)
        return self.encoder.encode(texts, role=role, progress="MTEB vectors")

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """Cosines of all pairs; one vector counts as one row."""
        return cosine_similarity_matrix(_rows(embeddings1), _rows(embeddings2))

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """The cosine of each row with its counterpart."""
        return pairwise_cosine(_rows(embeddings1), _rows(embeddings2))


def find_tasks(names: Sequence[str]) -> list[Any]:
    """MTEB's tasks of these names, before anything is computed.

    RecipeError without the extra `mteb`, for a name that it does not know, and on several processes: it deals out no work.
    ResourceError if the Hub does not answer for a task's data.
    """
    if importlib.util.find_spec("mteb") is None:
        raise RecipeError(
            '--mteb needs mteb: pip install "distill[mteb]". Files of your own need nothing: --evaluation.*'
        )
    if distributed.world_size() > 1:
        raise RecipeError(
            "--mteb runs in one process; start the recipe with python, without a launcher's --num_processes."
        )
    import mteb

    known = {task.metadata.name for task in mteb.get_tasks(exclude_superseded=False)}
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=3)
            hint = f" Did you mean {' or '.join(close)}?" if close else ""
            raise RecipeError(f"MTEB has no task {name!r} among its {len(known):,}.{hint}")
    tasks = [mteb.get_task(name) for name in names]
    for task in tasks:
        hub.dataset_commit(task.metadata.dataset["path"], revision=task.metadata.dataset["revision"])
    return tasks


def run_tasks(encoders: Mapping[str, Encoder], tasks: Sequence[Any], folder: Path) -> dict[str, dict[str, float]]:
    """Run MTEB's tasks on each encoder; its results lie below FOLDER/results. The main score of each task, by encoder and task.

    A task that has a result there is not run again. ResourceError if a task's data cannot be fetched.
    """
    import mteb

    found: dict[str, dict[str, float]] = {}
    for name, encoder in encoders.items():
        try:
            results = mteb.evaluate(MtebEncoder(encoder), tasks, cache=mteb.ResultCache(folder), co2_tracker=False)
        except OSError as error:  # what `datasets` raises without an answer, and for a name that is not there
            raise ResourceError(f"MTEB could not get the data of a task: {hub_errors.reason(error)}.") from error
        found[name] = {result.task_name: float(result.get_score()) for result in results.task_results}
    return found


def write_results(scores: Scores, data: EvaluationData, encoders: Mapping[str, Encoder], folder: Path) -> list[Path]:
    """What `encoders` reached on our own files, one JSON a task and encoder, as MTEB's TaskResult; the paths of these.

    The task is called as its file is, its revision is a hash of what is in it, the split "test". Numbers are shares of 1.
    Classification is that of `centroid_accuracy`, not of MTEB's logistic regression.
    """
    written: list[Path] = []
    for name, encoder in encoders.items():
        results = list(_task_results(scores.table.get(name, {}), data))
        place = folder / "results" / model_name(encoder).replace("/", "__").replace(" ", "_") / revision(encoder)
        for result in results:
            files.write_json(place / f"{result['task_name']}.json", result)
            written.append(place / f"{result['task_name']}.json")
        if results and not (place / "model_meta.json").exists():
            files.write_json(place / "model_meta.json", {"name": model_name(encoder), "revision": revision(encoder)})
    return written


def model_name(encoder: Encoder) -> str:
    """ORG/NAME, as MTEB calls a model."""
    parts = [part for part in Path(encoder.name).parts if part.strip("./")]
    return "/".join(["local", *parts][-2:])


def revision(encoder: Encoder) -> str:
    """The commit of a model of the Hub, or a digest of all that changes a vector, prompts included, in 40 digits."""
    parts = [encoder.fingerprint(), *(encoder.prompt(role) for role in (None, "query", "document"))]
    return encoder.commit or files.digest(json.dumps(parts, sort_keys=True).encode())[:40]


def _task_results(row: Mapping[str, Score], data: EvaluationData) -> Iterator[dict[str, Any]]:
    tasks = [(name, vars(task)) for name, task in data.pairs.items()]
    tasks += [(name, vars(task)) for name, task in data.retrieval.items()]
    tasks += [
        (name, {"train": vars(task), "test": vars(task.test)}) for name, task in data.labelled.items() if task.test
    ]
    for name, content in tasks:
        found = {metric: score for metric in _NAMES if (score := row.get(f"{name} {metric}".strip()))}
        values = {title: score.interval.value for metric, score in found.items() for title in _NAMES[metric]}
        if values and all(map(math.isfinite, values.values())):
            yield _task_result(name or "held-out", content, values)


def _task_result(name: str, content: Mapping[str, Any], values: dict[str, float]) -> dict[str, Any]:
    main = next(iter(values.values()))
    subset = {**values, "main_score": main, "hf_subset": "default", "languages": [LANGUAGE]}
    return {
        "dataset_revision": files.digest(json.dumps(content, sort_keys=True, default=vars).encode())[:40],
        "task_name": name,
        "mteb_version": None,
        "scores": {"test": [subset]},
        "evaluation_time": None,
        "kg_co2_emissions": None,
    }


def _rows(vectors: Any) -> Float[Tensor, "n d"]:
    found = torch.as_tensor(vectors).float()
    return found if found.ndim == 2 else found.unsqueeze(0)
