"""Score model folders side by side on the same data; the first is compared with each other one, in pairs.

Texts alone are enough for fidelity to the teacher: on all of them, by length, and where its own neighbours lie close.

A difference has a 95 % interval and a p-value: means by sign flips, rank correlations by the bootstrap.

Results lie below OUTPUT/mteb in MTEB's form, too; --mteb runs MTEB's own tasks, where the Hub is reachable.

accelerate launch recipes/evaluate.py --models runs/mine/student other/model --texts held-out.jsonl

python recipes/evaluate.py --models runs/mine/student --mteb STSBenchmark SciFact
"""

import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from distill import cli, distributed, files, page
from distill.config import EvaluationConfig, TeacherConfig
from distill.data import load_texts
from distill.encoder import Encoder
from distill.errors import RecipeError
from distill.evaluation import INDEX, differences_json, evaluate, mteb, retention_json, slice_table
from distill.export import this_command
from distill.gates import Gate, enforce, judge, read_gates


@dataclass(frozen=True, kw_only=True)
class Recipe:
    models: tuple[str, ...]
    """Folders or names; any sentence-transformers model of modules that distill knows."""
    texts: tuple[str, ...] = ()
    """Texts for fidelity to the teacher: files, globs, Hub data sets."""
    column: str | None = None
    """Column of the texts."""
    limit: int | None = 2000
    """Read at most this many of --texts."""
    speed: bool = True
    """Measure texts a second, the teacher's, too: half a second or more a model."""
    mteb: tuple[str, ...] = ()
    """Names of MTEB's tasks to run the models on, in one process. Needs the extra mteb, and the Hub for their data."""
    store: Path | None = None
    """Folder of the teacher's vectors; None: in the cache, by teacher."""
    output: Path = Path("runs/evaluate")
    """Folder of report.json, report.html and mteb/."""
    gate: tuple[str, ...] = ()
    """What the first model must reach, such as "overlap@10 >= 0.6"; another with its name in front: "NAME: ndcg@10 >= 0.5". Missed: exit code 7."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        if len(set(self.models)) < len(self.models) or not self.models:
            raise RecipeError("--models names one or more different models.")
        own = self.texts or self.evaluation.sts or self.evaluation.corpus or self.evaluation.classify_test
        if not own and not self.mteb:
            raise RecipeError("nothing to score on: give --texts, some of --evaluation.*, or --mteb.")
        self.gates()

    def gates(self) -> tuple[Gate, ...]:
        systems = [name + index for name in self.models for index in ("", INDEX)]
        return read_gates(self.gate, self.evaluation.tasks(), [*systems, "teacher"])


def main(recipe: Recipe) -> None:
    cli.record(recipe, recipe.output, leaves=())
    began = time.monotonic()
    read = load_texts(recipe.texts, column=recipe.column, limit=recipe.limit) if recipe.texts else None
    data = recipe.evaluation.load(read.texts if read else [])
    if read:
        cli.say(read.report)
    tasks = mteb.find_tasks(recipe.mteb) if recipe.mteb else []
    teacher = recipe.teacher.load()
    models = {name: Encoder.from_pretrained(name).to(distributed.device()) for name in recipe.models}
    loaded = time.monotonic()
    alike = all(model.width == teacher.width for model in models.values())
    scores = evaluate(models, teacher, data, store=recipe.store, keep_index=alike, speed=recipe.speed)
    first, *others = recipe.models
    differences = {other: scores.differences(first, other) for other in others}
    verdicts = judge(recipe.gates(), scores)
    report: dict[str, Any] = {"teacher": teacher.name, "command": this_command()}
    report |= {"data": str(read.report)} if read else {}
    report |= scores.as_json() | retention_json(scores)
    report |= {
        "differences": {other: differences_json(found) for other, found in differences.items()},
        "gates": [verdict.as_json() for verdict in verdicts],
    }
    distributed.main_first(partial(mteb.write_results, scores, data, models, recipe.output / "mteb"))
    if tasks:
        report["mteb"] = mteb.run_tasks(models, tasks, recipe.output / "mteb")
    distributed.main_first(partial(write, recipe.output, report))
    cli.say(scores)
    for name, slices in scores.slices.items():
        cli.say(f"\nfidelity of {name} to the teacher:\n{slice_table(slices)}")
    if scores.stored:
        cli.say(f"\nvectors in fewer bytes, and the share of float32's score they keep:\n{scores.stored_table()}")
    for name, found in report.get("mteb", {}).items():
        cli.say(f"\nMTEB, {name}: {', '.join(f'{task} {score:.4f}' for task, score in found.items())}")
    for other, found in differences.items():
        lines = [f"\n  {metric}: {difference}" for metric, difference in found.items()]
        cli.say(f"\n{first} - {other}, paired:{''.join(lines)}")
    cli.say(f"\nread in {loaded - began:.1f} s, scored in {time.monotonic() - loaded:.1f} s")
    cli.say(f"\nAll numbers are in {recipe.output / page.REPORT}, to look at in {recipe.output / page.PAGE}.")
    enforce(verdicts)


def write(output: Path, report: dict[str, Any]) -> None:
    files.write_json(output / page.REPORT, report)
    page.write_models(output, report)


if __name__ == "__main__":
    cli.run(main, Recipe)
