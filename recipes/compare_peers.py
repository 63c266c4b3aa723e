"""One start, one set of texts, one wall time: distill beside the trainers of other libraries, seed by seed.

    accelerate launch recipes/compare_peers.py --data texts.jsonl --minutes 3 --evaluation.sts dev.csv \\
        --evaluation.corpus docs.jsonl --evaluation.queries queries.jsonl --evaluation.qrels qrels.txt
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean

import torch

from distill import cli, distributed, files, hub, runlog
from distill.benchmark import measuring
from distill.benchmark.peers import PEERS, Trained, Work, steps_that_fit
from distill.benchmark.seeds import Averaged, average
from distill.config import EvaluationConfig, LossConfig, StudentConfig, TeacherConfig, at_least, hold_out, unused
from distill.data import load_texts
from distill.embed import embed
from distill.encoder import Encoder
from distill.errors import RecipeError
from distill.evaluation import INDEX, START, EvaluationData, Scores, evaluate
from distill.export import Provenance, export, this_command
from distill.store import Store
from distill.training import TrainConfig, match, train

OURS = "distill"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    data: tuple[str, ...]
    """Files (JSONL, CSV, unquoted TSV, TXT, Parquet, .gz), globs, saved datasets, Hub data sets as org/name@REVISION:config:split."""
    column: str | None = None
    """Column of the texts, or several: "sentence1,sentence2"; by place: "0,1"."""
    limit: int | None = None
    """Read this many texts at most."""
    held_out: int | None = None
    """Texts kept for the fidelity report; None: a tenth, 500 at most."""
    minutes: float = 3.0
    """Wall time of each training."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of each way that trains."""
    peers: tuple[str, ...] = tuple(PEERS)
    """Which other libraries to run; those that are not installed, or fail, are left out and reported."""
    peer_seeds: int | None = None
    """Train the others with only the first so many of --seeds. None: with all."""
    peer_batch_size: int | None = None
    """None: that of --train."""
    peer_learning_rate: float | None = None
    """None: that of --train."""
    store: Path | None = None
    """Folder of the teacher's vectors; None: in the cache, by teacher."""
    output: Path = Path("runs/compare_peers")
    """Folder of compare.json and of every student."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(learning_rate=2e-3, schedule="constant", ema_decay=0.995, bank_size=4096)
    )
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        wrong = [name for name in self.peers if name not in PEERS]
        if wrong:
            raise RecipeError(f"--peers knows {', '.join(PEERS)}; got {', '.join(wrong)}.")
        if self.student.space is not None or self.loss.temperature == "auto":
            raise RecipeError("compare_peers has no --student.space and no --loss.temperature auto: give a number.")
        others = [name for name in self.peers if name.startswith("sentence-transformers") and self.peer_seeds != 0]
        if self.student.table == "int8" and others:
            raise RecipeError(
                f"--student.table int8 is a start that {others[0]} cannot train: compare with a float32 table, or give --peer-seeds 0."
            )
        if not self.minutes > 0 or not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise RecipeError(
                f"--minutes is above 0 and --seeds are different numbers, got {self.minutes} and {self.seeds}."
            )
        instead = (
            "--minutes ends each training; it saves once, at its end, and cannot be resumed. --seeds gives its seeds."
        )
        unused("train", self.train, ("steps", "epochs", "save_every", "seed", "resume"), instead)
        self.train.check_bank(self.loss)
        at_least(1, "--limit", self.limit)
        at_least(0, "--held-out", self.held_out)
        at_least(0, "--peer-seeds", self.peer_seeds)


def main(recipe: Recipe) -> None:
    if distributed.world_size() > 1:
        raise RecipeError("compare_peers measures one process: add --num_processes 1, or start it with python.")
    cli.record(recipe, recipe.output, leaves=())
    read = load_texts(recipe.data, column=recipe.column, limit=recipe.limit)
    texts, held_out = hold_out(read.texts, recipe.held_out)
    data = recipe.evaluation.load(held_out, training_texts=texts)
    cli.say(f"{read.report}; {len(held_out):,} held out; {recipe.minutes:g} minutes each")

    teacher = recipe.teacher.load(in_roles=False)
    recipe.student.check(teacher)
    recipe.loss.check(teacher.width)
    store = embed(texts, teacher, recipe.store)
    provenance = Provenance(teacher=teacher, data=str(read.report), loss=repr(recipe.loss))
    found: dict[str, list[Trained]] = {}
    left_out: dict[str, str] = {}
    scores: list[Scores] = []
    for number, seed in enumerate(recipe.seeds):
        peers = recipe.peers if recipe.peer_seeds is None or number < recipe.peer_seeds else ()
        trained = one_seed(recipe, seed, peers, teacher, store, texts, provenance, left_out)
        if number:
            del trained[START]  # the first seed's has been scored
        for name, one in trained.items():
            found.setdefault(name, []).append(one)
        scores.append(scored(trained, teacher, data, store))
        write(recipe, scores, found, left_out)
    cli.say(f"\n{table(scores, found)}\n\n{caption(recipe)}")
    for name, reason in left_out.items():
        cli.say(f"Left out: {name}: {reason}.")


def one_seed(
    recipe: Recipe,
    seed: int,
    peers: Sequence[str],
    teacher: Encoder,
    store: Store,
    texts: list[str],
    provenance: Provenance,
    left_out: dict[str, str],
) -> dict[str, Trained]:
    """Every way's student. `left_out` gets the peers that fail, with the first line of the reason."""
    folder = recipe.output / f"seed-{seed}"
    torch.manual_seed(seed)
    start = recipe.student.build(teacher, store, texts)
    export(start, folder / "start", provenance=provenance)
    trained = {START: Trained(copy.deepcopy(start), 0.0), OURS: ours(recipe, seed, start, teacher, store, texts)}
    export(trained[OURS].student, folder / OURS, provenance=provenance)
    for name in peers:
        work = Work(
            start=folder / "start",
            teacher=hub.resolve_model(recipe.teacher.name, revision=recipe.teacher.revision).path,
            texts=texts,
            vectors=store.vectors(texts, prompt=teacher.prompt(None)),
            seconds=60 * recipe.minutes,
            batch_size=recipe.peer_batch_size or recipe.train.batch_size,
            learning_rate=recipe.peer_learning_rate or recipe.train.learning_rate,
            bf16=recipe.train.mixed_precision == "bf16",
            seed=seed,
            output=folder / name.replace(", ", "-"),
        )
        cli.say(f"seed {seed}: {name}")
        try:
            trained[name] = PEERS[name](work)
        except Exception as error:
            left_out[name] = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
    return trained


def ours(recipe: Recipe, seed: int, start: Encoder, teacher: Encoder, store: Store, texts: list[str]) -> Trained:
    """As many steps as fit, found by a probe, as the rate's schedule is one of steps; like the others, none longer than that."""
    cli.say(f"seed {seed}: {OURS}")
    output, config = recipe.output / f"seed-{seed}" / "run", replace(recipe.train, seed=seed)

    def run(steps: int, output: Path, seconds: float = math.inf) -> Trained:
        student = copy.deepcopy(start)
        examples, some = match(texts, student, teacher, store), replace(config, steps=steps, save_every=steps)
        loss = recipe.loss.build(teacher.width)
        done = train(student, examples, store, loss, some, output=output, seconds=seconds)
        return Trained(done.student, done.seconds, done.steps)

    def probe(steps: int) -> list[float]:
        run(steps, output / "probe")
        return [step["seconds"] for step in runlog.read(output / "probe" / runlog.NAME)]

    limit = 60 * recipe.minutes
    return run(steps_that_fit(limit, probe), output, limit)


def scored(trained: Mapping[str, Trained], teacher: Encoder, data: EvaluationData, store: Store) -> Scores:
    """All in one table; those of the teacher's width also search its index."""
    tables, speeds = {}, {}
    for alike in (True, False):
        students = {name: one.student for name, one in trained.items() if (one.student.width == teacher.width) is alike}
        if students:
            scores = evaluate(students, teacher, data, store=store.path, keep_index=alike)
            tables, speeds = tables | scores.table, speeds | scores.speeds
    return Scores(tables, speeds)


# What is shown


def write(
    recipe: Recipe, scores: Sequence[Scores], found: Mapping[str, Sequence[Trained]], left_out: Mapping[str, str]
) -> None:
    runs = {
        name: [{"seconds": one.seconds, "steps": one.steps, "parameters": one.student.parameter_count} for one in some]
        for name, some in found.items()
    }
    report = {
        "command": this_command(),
        "machine": machine(),
        "seeds": recipe.seeds,
        "left_out": left_out,
        "runs": runs,
    }
    files.write_json(recipe.output / "compare.json", report | {"scores": [one.as_json() for one in scores]})


def table(scores: Sequence[Scores], found: Mapping[str, Sequence[Trained]]) -> str:
    averaged = average(scores)
    return measuring.markdown(
        [row("teacher", averaged, []), *(row(name, averaged, some) for name, some in found.items())]
    )


def row(name: str, averaged: Mapping[str, Mapping[str, Averaged]], trained: Sequence[Trained]) -> dict[str, str]:
    """Every score and, where the teacher has it too, the share that is kept; then those with the teacher's index."""
    teacher, mine, index = averaged["teacher"], averaged[name], averaged.get(f"{name} -> teacher's index", {})
    metrics = dict.fromkeys(metric for system in averaged.values() for metric in system)
    cells = {
        "": name,
        "parameters": f"{trained[0].student.parameter_count / 1e6:.1f}M" if trained else "",
        "minutes": f"{fmean(one.seconds for one in trained) / 60:.2g}" if trained else "",
        "steps": f"{fmean(steps):,.0f}" if (steps := [one.steps for one in trained if one.steps]) else "",
    }
    cells |= {metric: cell(mine.get(metric), teacher.get(metric)) for metric in metrics}
    with_index = dict.fromkeys(m for system, some in averaged.items() if system.endswith(INDEX) for m in some)
    return cells | {f"{metric}, teacher's index": cell(index.get(metric), teacher.get(metric)) for metric in with_index}


def cell(score: Averaged | None, of: Averaged | None) -> str:
    if score is None:
        return ""
    if of is None or of is score or not of.interval.value > 0:
        return str(score)
    return f"{score} ({score.interval.value / of.interval.value:.1%})"


def machine() -> str:
    return measuring.machine("transformers", "sentence-transformers", "model2vec", "tokenlearn")


def caption(recipe: Recipe) -> str:
    fewer = "" if recipe.peer_seeds is None else f" (of the others over the first {recipe.peer_seeds})"
    return (
        f"`{this_command()}` ({machine()}). Means over seeds {', '.join(map(str, recipe.seeds))}{fewer}; ± is half of the bootstrap "
        "95 % interval over the texts, mean over seeds; seeds are the lowest and the highest; in brackets what is kept of the "
        "teacher's score. Minutes are those of the training alone."
    )


if __name__ == "__main__":
    cli.run(main, Recipe)
