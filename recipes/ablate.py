"""What a choice is worth: one recipe, and variants of it that differ in a flag or two, on the same texts and dev sets.

A variant keeps what it does not name: "student.kind layers" its batch size and learning rate, too.

    accelerate launch recipes/ablate.py --data texts.jsonl --evaluation.sts dev.csv --seeds 0 1 2 \\
        --variants "train.bank-size 1024" "train.ema-decay 0.995, train.schedule constant" "student.projection ridge"
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean

from distill import cli, files
from distill.benchmark import measuring
from distill.benchmark.seeds import average
from distill.config import EvaluationConfig, LossConfig, StudentConfig, TeacherConfig, at_least, hold_out, unused
from distill.data import load_texts
from distill.embed import embed
from distill.encoder import Encoder
from distill.errors import RecipeError
from distill.evaluation import INDEX, Scores, evaluate
from distill.export import this_command
from distill.metrics import Interval
from distill.store import Store
from distill.training import Run, TrainConfig, match, train

BASE = "as given"
# Flags that every variant shares: the texts, the teacher and what is measured.
SHARED = ("data", "column", "limit", "held_out", "seeds", "store", "output", "teacher", "evaluation", "variants")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    data: tuple[str, ...]
    """Files (JSONL, CSV, unquoted TSV, TXT, Parquet, .gz), globs, saved datasets, Hub data sets as org/name@REVISION:config:split."""
    variants: tuple[str, ...] = ()
    """Each the flags that it changes, without dashes, commas between them: "train.bank-size 1024, loss.kl 1"."""
    column: str | None = None
    """Column of the texts, or several: "sentence1,sentence2"; by place: "0,1"."""
    limit: int | None = None
    """Read this many texts at most."""
    held_out: int | None = None
    """Texts kept for the fidelity report; None: a tenth, 500 at most."""
    seeds: tuple[int, ...] = (0,)
    """Of each variant."""
    store: Path | None = None
    """Folder of the teacher's vectors; None: in the cache, by teacher."""
    output: Path = Path("runs/ablate")
    """Folder of ablate.json and of every run."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            epochs=5.0, learning_rate=2e-3, schedule="constant", ema_decay=0.995, bank_size=4096
        )
    )
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        if self.student.space is not None or self.loss.temperature == "auto":
            raise RecipeError("ablate has no --student.space and no --loss.temperature auto: give a number.")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise RecipeError(f"--seeds are different numbers, got {self.seeds}.")
        if len({BASE, *self.variants}) <= len(self.variants):
            raise RecipeError(f"--variants are different, and none is {BASE!r}.")
        unused("train", self.train, ("seed",), "--seeds are those of every variant.")
        self.train.check_bank(self.loss)
        at_least(1, "--limit", self.limit)
        at_least(0, "--held-out", self.held_out)


def main(recipe: Recipe) -> None:
    variants = {BASE: recipe} | {flags: variant(recipe, flags) for flags in recipe.variants}
    cli.record(recipe, recipe.output, leaves=())
    read = load_texts(recipe.data, column=recipe.column, limit=recipe.limit)
    texts, held_out = hold_out(read.texts, recipe.held_out)
    data = recipe.evaluation.load(held_out, training_texts=texts)
    cli.say(f"{read.report}; {len(held_out):,} held out")

    teacher = recipe.teacher.load(in_roles=False)
    for one in variants.values():
        one.student.check(teacher)
        one.loss.check(teacher.width)
    store = embed(texts, teacher, recipe.store)
    runs: dict[str, list[Run]] = {name: [] for name in variants}
    scores: list[Scores] = []
    for seed in recipe.seeds:
        for number, (name, one) in enumerate(variants.items()):
            cli.say(f"seed {seed}: {name}")
            folder = recipe.output / f"seed-{seed}" / f"variant-{number}"
            runs[name].append(trained(one, seed, teacher, store, texts, folder))
        students = {name: some[-1].student for name, some in runs.items()}
        scores.append(evaluate(students, teacher, data, store=store.path, speed=False))
        write(recipe, scores, runs)
    cli.say(f"\n{table(scores, runs)}\n\n{caption(recipe)}")


def variant(recipe: Recipe, flags: str) -> Recipe:
    one = cli.varied(recipe, " ".join(f"--{flag.strip()}" for flag in flags.split(",")))
    changed = [name for name in SHARED if getattr(one, name) != getattr(recipe, name)]
    changed += ["train.resume"] if one.train.resume != recipe.train.resume else []
    if changed:
        flag = "--" + changed[0].replace("_", "-")
        raise RecipeError(
            f"--variants change --student, --loss and --train; {flags!r} changes {flag}, which all share."
        )
    if one == recipe:
        raise RecipeError(f"--variants {flags!r} changes nothing.")
    return one


def trained(recipe: Recipe, seed: int, teacher: Encoder, store: Store, texts: list[str], output: Path) -> Run:
    """One variant's run; its folder has a recipe.json of its own, which --train.resume is checked against."""
    cli.record(replace(recipe, variants=(), seeds=(seed,)), output, quiet=True)
    student = recipe.student.build(teacher, store, texts)
    examples, loss = match(texts, student, teacher, store), recipe.loss.build(teacher.width)
    return train(student, examples, store, loss, replace(recipe.train, seed=seed), output=output)


# What is shown


def write(recipe: Recipe, scores: Sequence[Scores], runs: Mapping[str, Sequence[Run]]) -> None:
    trained = {name: [{"seconds": run.seconds, "steps": run.steps} for run in some] for name, some in runs.items()}
    report = {"command": this_command(), "machine": measuring.machine("transformers"), "seeds": recipe.seeds}
    found = {"runs": trained, "scores": [one.as_json() for one in scores], "differences": differences(scores, runs)}
    files.write_json(recipe.output / "ablate.json", report | found)


def differences(scores: Sequence[Scores], runs: Mapping[str, object]) -> dict[str, dict[str, list[float]]]:
    """Of each variant to the recipe as given, metric by metric: value, low and high, means over seeds."""
    return {
        name + index: {
            metric: [fmean(getattr(one[metric], bound) for one in found) for bound in ("value", "low", "high")]
            for metric in found[0]
        }
        for name in runs
        for index in ("", INDEX)
        if name != BASE and name + index in scores[0].table
        for found in [[paired(one, name, index) for one in scores]]
    }


def paired(scores: Scores, name: str, index: str) -> dict[str, Interval]:
    found = scores.differences(name + index, BASE + index)
    return {metric: found[metric].interval for metric in scores.table[name + index] if metric in found}


def table(scores: Sequence[Scores], runs: Mapping[str, Sequence[Run]]) -> str:
    averaged, changes = average(scores), differences(scores, runs)
    rows = []
    for name, some in runs.items():
        cells = {"": name, "minutes": f"{fmean(run.seconds for run in some) / 60:.2g}"}
        for index, suffix in (("", ""), (INDEX, ", teacher's index")):
            for metric, score in averaged.get(name + index, {}).items():
                change = changes.get(name + index, {}).get(metric)
                cells[metric + suffix] = f"{score.interval.value:.3f}" + (f" ({shown(change)})" if change else "")
        rows.append(cells)
    return measuring.markdown(rows)


def shown(change: Sequence[float]) -> str:
    value, low, high = change
    return f"{value:+.3f} [{low:+.3f}, {high:+.3f}]"


def caption(recipe: Recipe) -> str:
    return (
        f"`{this_command()}` ({measuring.machine('transformers')}). Means over seeds {', '.join(map(str, recipe.seeds))}; in "
        "brackets the difference to the recipe as given, with its paired bootstrap 95 % interval over the texts."
    )


if __name__ == "__main__":
    cli.run(main, Recipe)
