"""Every recipe as users run it: real processes, one and two, tiny models and files; and every kind of bad input, end to end.

Runs are started once a session, two at a time, and shared by the tests.
"""

import csv
import itertools
import json
import math
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from forks import Forks
from safetensors.torch import load_file, save_file

from distill.encoder import Encoder
from distill.head_folder import load_head
from distill.store import Store, text_keys
from distill.truncation import truncate_texts

pytestmark = pytest.mark.timeout(3000)  # a test may wait for the runs of all others, which were started before its own
ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted(path for path in (ROOT / "recipes").glob("*.py") if not path.name.startswith("_"))
PYTHON = [sys.executable]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"]

# Each recipe in its small mode, variant by variant. {name} stands for a file or folder of the session.
# keep_index: a ridge start on 50 texts multiplies rounding by 24. At a learning rate of 1e-3 AdamW then carries one process
# itself 7e-6 away from float64 in three steps, too far to compare two to 1e-5; test_training compares them in float64.
TEXTS = "--data {texts} --held-out 21 --teacher.name {bert} --train.steps 6 --train.batch-size 16"
SMALL = {
    "quickstart": {
        "static": "--teacher {bert} --texts 100 --held-out 20 --steps 5",
        "layers": "--teacher {mpnet} --texts 100 --held-out 20 --steps 5 --student layers",
    },
    "match_embeddings": {
        "static": TEXTS
        + " --evaluation.sts {sts} --evaluation.classify-train {labelled} --evaluation.classify-test {labelled}"
        " --gate overlap@10>=0 --gate accuracy>=0",
    },
    "match_similarities": {
        "static": TEXTS + " --train.bank-size 24 --student.width 8",
        "auto": TEXTS + " --train.bank-size 24 --student.width 8 --loss.temperature auto --loss.perplexity 8",
        "joined": TEXTS + " --train.bank-size 24 --student.width 8 --train.learning-rate 3e-4 --join.teachers {mpnet} "
        "--join.method gram --join.width 24",
        "everything": TEXTS
        + " --train.bank-size 24 --student.width 8 --loss.gram-kl 1 --loss.rkd-distance 1 --loss.contrastive-until 0.5 "
        "--loss.widths 8 16 --train.ema-decay 0.9 --train.start-decay 10 --train.projection-rate 0.5 "
        "--train.token-weight-rate 2 --train.hard-stage 0.5",
    },
    "keep_index": {
        "layers": "--documents {documents} --queries {queries} --held-out 12 --teacher.name {prompted} --train.steps 6 "
        "--train.batch-size 16 --train.bank-size 24 --train.learning-rate 3e-4 --student.kind layers --student.projection ridge "
        "--evaluation.corpus {documents} --evaluation.queries {queries} --evaluation.qrels {qrels}",
        "sides": "--documents {documents} --queries {queries} --held-out 12 --teacher.name {prompted} --train.steps 6 "
        "--train.batch-size 16 --train.bank-size 24 --student.width 8 --sides.query-prompt ? --sides.query-max-length 5 "
        "--sides.student-query-prompt what? --sides.student-max-length 9 "
        "--evaluation.corpus {documents} --evaluation.queries {queries} --evaluation.qrels {qrels}",
    },
    "evaluate": {
        "all": "--models {bert} {mpnet} --teacher.name {bert} --texts {texts} --evaluation.sts {sts} "
        "--evaluation.corpus {documents} --evaluation.queries {queries} --evaluation.qrels {qrels} --gate cosine>=0.99 cka>=0.99"
    },
    "classify": {
        "all": "--train-data {labelled} --test-data {labelled} --encoder {bert} --steps 20 --shots 5",
        "together": "--train-data {labelled} --test-data {labelled} --encoder {asked} --shots 1 --train-encoder "
        "--teacher.name {asked} --teacher.max-length 64 --labels.epochs 3 --labels.batch-size 24",
    },
    "incremental": {
        "all": "--train-data {labelled} --test-data {labelled} --encoder {bert} --tasks 3 --memory 1 --seeds 0 1 "
        "--labels.epochs 2 --labels.batch-size 16",
    },
    "bench_losses": {
        "all": "--losses cross_contrastive gram_mse rank_hinge --shapes 24 24 24 40 --width 32 --repeats 2 "
        "--arms naive attention one-tile distill liger-kernel"
    },
}
SMALL["compare_peers"] = {
    "all": "--data {texts} --held-out 12 --teacher.name {bert} --minutes 0.01 --seeds 0 1 --peer-seeds 1 --train.batch-size 16 "
    "--train.bank-size 24 --student.width 8 --evaluation.sts {sts} "
    "--evaluation.corpus {documents} --evaluation.queries {queries} --evaluation.qrels {qrels}"
}
SMALL["bench_pipeline"] = {"all": "--quick --mixed-precision both --data {texts} --teacher.name {bert}"}
SMALL["ablate"] = {
    "all": TEXTS + " --train.bank-size 24 --student.width 8 --seeds 0 1 --evaluation.sts {sts} "
    "--evaluation.corpus {documents} --evaluation.queries {queries} --evaluation.qrels {qrels} "
    "--variants train.bank-size=12 loss.kl=1,student.width=4"
}
# A recipe's plan is tested for each way that it is asked for; what it says, in test_planning.
PLANS = {
    "quickstart": "--teacher {bert} --texts 100 --held-out 20 --steps 5 --student layers --plan",
    "match_embeddings": TEXTS + " --plan",
    "match_similarities": TEXTS + " --train.bank-size 24 --loss.temperature auto --store-as int8 --plan",
    "keep_index": "--documents {documents} --queries {queries} --teacher.name {prompted} --train.steps 6 "
    "--train.batch-size 16 --sides.query-prompt ? --plan",
}
VARIANTS = [(recipe, variant) for recipe, variants in SMALL.items() for variant in variants]
MEASURING = ("bench_losses", "bench_pipeline", "compare_peers")  # of one process
STUDENTS = [
    (recipe, variant)
    for recipe, variant in VARIANTS
    if recipe not in ("ablate", "classify", "evaluate", "incremental", *MEASURING)
]


@dataclass(frozen=True)
class Ran:
    """What a process said, and where it wrote."""

    code: int
    out: str
    err: str
    output: Path

    def json(self, name: str) -> Any:
        return json.loads((self.output / name).read_text())

    def metrics(self) -> list[dict[str, float]]:
        return [json.loads(line) for line in (self.output / "metrics.jsonl").read_text().splitlines()]

    def left(self) -> set[str]:
        """What lies in the folder, but for the lock that every run takes."""
        return {path.name for path in self.output.iterdir()} - {".lock"}

    def all_is_well(self) -> "Ran":
        assert self.code == 0, f"exit code {self.code}\n{self.out}\n{self.err}"
        return self


class Session:
    """The files of the session, and the runs: each is started once, on demand or ahead of time."""

    def __init__(self, folder: Path, models: dict[str, Path]):
        self.folder = folder
        self.pool = ThreadPoolExecutor(2)
        self.futures: dict[str, Future[Any]] = {}
        self.names = {name: str(path) for name, path in (models | write_files(folder)).items()}
        binaries = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        self.environment = {
            **os.environ,
            "PATH": binaries,
            "PYTHONPATH": str(ROOT),
            "DISTILL_HOME": str(folder / "cache"),
        }
        self.environment |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        self.environment |= {"COLUMNS": "120", "ACCELERATE_USE_CPU": "true"}
        self.forks = Forks(RECIPES, self.environment)

    def start(self, job: str) -> "Future[Any]":
        if job not in self.futures:
            self.futures[job] = self.pool.submit(JOBS[job], self)
        return self.futures[job]

    def __call__(self, job: str) -> Any:
        return self.start(job).result()

    def command(self, recipe: str, flags: str, output: Path, launcher: list[str] = PYTHON) -> list[str]:
        filled = [flag.format(**self.names) for flag in flags.split()]
        out = [] if "--output" in filled or "--help" in filled else ["--output", str(output)]
        return [*launcher, str(ROOT / "recipes" / f"{recipe}.py"), *filled, *out]

    def run(self, recipe: str, flags: str, name: str, launcher: list[str] = PYTHON) -> Ran:
        output = self.folder / "runs" / name
        return self.shell(self.command(recipe, flags, output, launcher), output)

    def short(self, recipe: str, flags: str, name: str) -> Ran:
        """As `run`, in a fork: for runs that end before they have computed much."""
        output = self.folder / "runs" / name
        _, script, *arguments = self.command(recipe, flags, output)
        return Ran(*self.forks.run(Path(script), arguments, self.folder), output)

    def shell(self, command: list[str], output: Path) -> Ran:
        done = subprocess.run(
            command, env=self.environment, cwd=self.folder, capture_output=True, text=True, timeout=600, check=False
        )
        return Ran(done.returncode, done.stdout, done.stderr, output)

    def stopped(self, recipe: str, flags: str, name: str, number: int, steps: int = 4) -> Ran:
        """A run that gets a signal after some steps."""
        output = self.folder / "runs" / name
        command = self.command(recipe, flags, output)
        process = subprocess.Popen(
            command, env=self.environment, cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        log = output / "metrics.jsonl"
        while process.poll() is None and not (log.exists() and log.read_text().count("\n") >= steps):
            time.sleep(0.005)
        process.send_signal(number)
        out, err = process.communicate(timeout=120)
        return Ran(process.returncode, out, err, output)


def write_files(folder: Path) -> dict[str, Path]:
    chance = random.Random(0)
    words = sorted({word.strip(".,?") for text in tiny.SENTENCES for word in text.split()})
    texts = sorted({" ".join(chance.choices(words, k=chance.randint(3, 12))) for _ in range(62)})
    questions = [" ".join(text.split()[:3]) for text in texts[:24]]
    tables = {
        "texts": [{"text": text} for text in texts],
        "documents": [{"id": f"d{i}", "text": text} for i, text in enumerate(texts)],
        "queries": [{"id": f"q{i}", "text": text} for i, text in enumerate(questions)],
        "null": [{"text": "fine"}, {"text": None}],
        "number": [{"text": "fine"}, {"text": 3.5}],
        "nan": [{"text": "fine"}, {"text": math.nan}],
        "nothing": [],
        "three": [{"text": text} for text in texts[:3]],
    }
    paths = {name: folder / f"{name}.jsonl" for name in tables}
    for name, rows in tables.items():
        paths[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
    paths |= {"qrels": folder / "qrels.txt", "sts": folder / "sts.csv", "labelled": folder / "labelled.csv"}
    paths["qrels"].write_text("".join(f"q{i} 0 d{i} 1\n" for i in range(20)))
    pairs = [[one, other, f"{chance.uniform(0, 5):.2f}"] for one, other in itertools.pairwise(texts)]
    labels = [["text", "label"], *([text, text[0].lower()] for text in texts)]
    for name, rows in {"sts": pairs, "labelled": labels}.items():
        with paths[name].open("w", newline="") as file:
            csv.writer(file).writerows(rows)
    paths["in_the_way"] = folder / "in_the_way"
    paths["in_the_way"].write_text("a file")
    paths["no_model"] = folder / "no_model"
    paths["no_model"].mkdir()
    return paths


def read_labelled(session: Session) -> list[tuple[str, str]]:
    with Path(session.names["labelled"]).open(newline="") as file:
        return [(text, label) for text, label in list(csv.reader(file))[1:]]


def collapse(folder: Path) -> Path:
    """A model whose last normalisation has no gain: one vector for every text."""
    tiny.bert(folder, layers=2)
    state = load_file(folder / "model.safetensors")
    last = [name for name in state if name.endswith("LayerNorm.weight")]
    for name in last:
        state[name].zero_()
    for name in last:
        state[name.replace("weight", "bias")].normal_(generator=torch.Generator().manual_seed(0))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def session(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, tiny_mpnet: Path
) -> Iterator[Session]:
    folder = tmp_path_factory.mktemp("recipes")
    prompts = {"query": "How do I find ", "document": "Interest rates: "}
    models = {"bert": tiny_bert, "mpnet": tiny_mpnet, "collapsed": collapse(folder / "collapsed")}
    models["prompted"] = tiny.bert(folder / "prompted", layers=4, prompts=prompts)
    models["asked"] = tiny.bert(folder / "asked", prompts={"sort": "Please cancel: "}, default_prompt_name="sort")
    session = Session(folder, models)
    if sum(item.path == Path(__file__) for item in request.session.items) > 10:
        for job in JOBS:
            session.start(job)
    yield session
    session.pool.shutdown(cancel_futures=True)
    session.forks.close()


# Jobs: the runs that tests share

JOBS: dict[str, Callable[[Session], Any]] = {}


def job(name: str) -> Callable[[Callable[[Session], Any]], Callable[[Session], Any]]:
    def add(function: Callable[[Session], Any]) -> Callable[[Session], Any]:
        JOBS[name] = function
        return function

    return add


def add_small_runs() -> None:
    for number, (recipe, variant) in enumerate(VARIANTS):
        flags, name = SMALL[recipe][variant], f"{recipe}-{variant}"
        launchers = {"one": PYTHON, "two": [*TORCHRUN, str(29610 + number)]}
        for processes, launcher in launchers.items():
            place = f"{name}-{processes}"
            without = recipe in ("bench_losses", "incremental") or name == "classify-all"
            own = "" if without else f" --store stores/{place}"
            JOBS[place] = lambda s, r=recipe, f=flags + own, p=place, la=launcher: s.run(r, f, p, la)


add_small_runs()
BAD = {
    "unknown flag": ("match_embeddings", "--data {texts} --train.batch-sise 3", 2, ["--train.batch-size"]),
    "out of range": ("quickstart", "--texts 3", 2, ["--texts and --held-out are 16 or more, got 3 and 300"]),
    "steps out of range": ("quickstart", "--steps 0", 2, ["steps is above 0, got 0"]),
    "no weight": (
        "match_similarities",
        "--data x --loss.cosine 0 --loss.contrastive 0",
        2,
        ["cosine or contrastive above 0"],
    ),
    "temperature": ("keep_index", "--documents x --temperature 0", 2, ["--temperature is above 0, got 0.0"]),
    "no room for a query": (
        "keep_index",
        "--documents x --sides.query-max-length 0",
        2,
        ["--sides.query-max-length is 1 or more, got 0"],
    ),
    "a hard stage without a bank": (
        "match_similarities",
        "--data x --loss.contrastive 0 --train.hard-stage 0.1",
        2,
        ["--train.hard-stage fills the bank of a loss, and this one uses none"],
    ),
    "a hard stage of cosines": (
        "match_embeddings",
        "--data x --train.bank-size 8 --train.hard-stage 0.1",
        2,
        ["--train.hard-stage fills the bank of a loss"],
    ),
    "a variant without a bank": (
        "ablate",
        "--data x --train.bank-size 8 --variants loss.contrastive=0,train.hard-stage=0.5",
        2,
        ["--train.hard-stage fills the bank of a loss"],
    ),
    "wider than the teacher": (
        "match_similarities",
        "--data {texts} --teacher.name {bert} --loss.widths 8 64 --store stores/never",
        2,
        ["--loss.widths go up to the teacher's 32, got 64"],
    ),
    "prompt after the fit": (
        "keep_index",
        "--documents x --sides.student-query-prompt ask: --student.projection ridge",
        2,
        ["a projection is fitted before (--student.projection ridge", "leave one out"],
    ),
    "longer than documents": (
        "keep_index",
        "--documents {documents} --queries {queries} --teacher.name {bert} --sides.query-max-length 65",
        2,
        ["it cannot be cut at 65. Raise --teacher.max-length"],
    ),
    "no such arm": ("bench_losses", "--arms nave", 2, ["--arms knows naive, torch.compile", "got nave"]),
    "fewer columns": ("bench_losses", "--shapes 20 10", 2, ["as many columns as rows or more; got ((20, 10),)"]),
    "a static student of steps": (
        "bench_pipeline",
        "--student.kind static",
        2,
        ["is the transformer of the part step"],
    ),
    "no such peer": (
        "compare_peers",
        "--data x --peers sbert",
        2,
        ["--peers knows sentence-transformers, Embed", "got sbert"],
    ),
    "a start that peers cannot train": (
        "compare_peers",
        "--data x --student.table int8",
        2,
        ["sentence-transformers, EmbedDistillLoss cannot train", "--peer-seeds 0"],
    ),
    "steps of its own": (
        "compare_peers",
        "--data x --train.steps 9 --train.save-every 3 --train.resume",
        2,
        ["--train.steps, --train.save-every, --train.resume would change nothing here", "--minutes"],
    ),
    "no minutes": ("compare_peers", "--data x --minutes 0", 2, ["--minutes is above 0"]),
    "no such variant": ("ablate", "--data x --variants train.bank=3", 2, ["--train.bank"]),
    "variant of the data": ("ablate", "--data x --variants limit=3", 2, ["'limit=3' changes --limit, which all share"]),
    "variant of the seed": ("ablate", "--data x --variants train.seed=5", 2, ["--train.seed", "--seeds"]),
    "variant of resume": ("ablate", "--data x --variants train.resume", 2, ["'train.resume' changes --train.resume"]),
    "variant of nothing": ("ablate", "--data x --variants train.bank-size=4096", 2, ["changes nothing"]),
    "no such matrix": (
        "bench_losses",
        "--losses gram_mse --shapes 10 20",
        2,
        ["give --shapes of as many columns as rows"],
    ),
    "one task": ("incremental", "--train-data x --encoder x --tasks 1", 2, ["--tasks is 2 or more, got 1"]),
    "one way twice": (
        "incremental",
        "--train-data x --encoder x --ways less-forget less-forget",
        2,
        ["--ways are different, got less-forget, less-forget"],
    ),
    "no such way": ("incremental", "--train-data x --encoder x --ways ewc", 2, ["--ways knows fine-tuning", "got ewc"]),
    "pull below 0": (
        "classify",
        "--train-data x --test-data x --labels.distillation -1",
        2,
        ["distillation is 0 or more, got -1.0"],
    ),
    "labels of a head alone": (
        "classify",
        "--train-data x --test-data x --labels.epochs 3 --labels.batch-size 1",
        2,
        ["--labels.epochs, --labels.batch-size would change nothing here: they belong to --train-encoder"],
    ),
    "a teacher of a head alone": (
        "classify",
        "--train-data x --test-data x --teacher.name x",
        2,
        ["--teacher.name would change nothing here: they belong to --train-encoder"],
    ),
    "a store of a head alone": (
        "classify",
        "--train-data x --test-data x --store x",
        2,
        ["--store would change nothing here: they belong to --train-encoder"],
    ),
    "steps of an encoder": (
        "classify",
        "--train-data x --test-data x --train-encoder --steps 3 --sigma-learning-rate 1",
        2,
        ["--steps, --sigma-learning-rate would change nothing here: --train-encoder has --labels.epochs"],
    ),
    "no proxies": ("classify", "--train-data x --test-data x --proxies 0", 2, ["--proxies must be above 0"]),
    "impossible": (
        "match_embeddings",
        "--data {texts} --teacher.name absent --student.kind pretrained",
        2,
        ["--student.name"],
    ),
    "no such score": (
        "match_embeddings",
        "--data x --gate overlap@5>=0.6",
        2,
        ["no score 'overlap@5'", "Did you mean"],
    ),
    "no labels to gate": ("match_similarities", "--data x --gate ndcg@10>=0.6", 2, ["There are: cosine to teacher"]),
    "no system to gate": (
        "evaluate",
        "--models {bert} --texts {texts} --gate start:cka>=0.6",
        2,
        ["--gate knows no system 'start'"],
    ),
    "missed": (
        "match_embeddings",
        "--data {texts} --teacher.name {bert} --train.steps 2 --gate cosine<2 overlap@10>=2",
        7,
        ["1 of 2 gates missed: overlap@10>=2. Everything is written."],
    ),
    "null row": ("match_embeddings", "--data {null}", 3, ["null.jsonl, line 2, column 'text'", "null"]),
    "number row": ("match_embeddings", "--data {number}", 3, ["number.jsonl, line 2, column 'text'", "3.5"]),
    "nan row": ("match_embeddings", "--data {nan}", 3, ["nan.jsonl, line 2, column 'text'", "NaN"]),
    "empty": ("match_embeddings", "--data {nothing}", 3, ["nothing.jsonl"]),
    "absent evaluation": (
        "match_embeddings",
        "--data {texts} --evaluation.sts absent.csv",
        3,
        ["absent.csv does not exist"],
    ),
    "unknown teacher": (
        "match_embeddings",
        "--data {texts} --teacher.name no/such",
        6,
        ["no/such", "Ways out", "local folder"],
    ),
    "no model": ("match_embeddings", "--data {texts} --teacher.name {no_model}", 6, ["no_model is no model"]),
    "in the way": ("match_embeddings", "--data {texts} --output {in_the_way}", 6, ["in_the_way", "--output"]),
    "collapsed": ("match_embeddings", "--data {texts} --teacher.name {collapsed}", 5, ["the same vector", "collapsed"]),
    "not finite": (
        "match_embeddings",
        "--data {texts} --teacher.name {bert} --train.learning-rate 1e38 --train.steps 9",
        5,
        ["step", "non-finite.json", "--train.learning-rate"],
    ),
}
for case, (bad_recipe, bad_flags, _, _) in BAD.items():
    JOBS[case] = lambda s, r=bad_recipe, f=bad_flags, c=case: s.short(r, f, c)
for path in RECIPES:
    JOBS[f"help {path.stem}"] = lambda s, r=path.stem: s.short(r, "--help", f"help {r}")


@job("launched")
def _(session: Session) -> Ran:
    launcher = ["accelerate", "launch", "--cpu"]
    return session.run("classify", SMALL["classify"]["all"], "launched", launcher)


@job("again")
def _(session: Session) -> tuple[Ran, dict[str, int], Ran, dict[str, int]]:
    """A recipe twice into one folder and from one store, the second time with fewer steps; and the store after each."""
    flags = SMALL["quickstart"]["static"] + " --store stores/again"

    def stored() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in (session.folder / "stores" / "again").glob("*.*")}

    first = session.run("quickstart", flags, "again")
    before = stored()
    (first.output / "student" / "left-over.txt").write_text("of the first run")
    return first, before, session.run("quickstart", flags.replace("--steps 5", "--steps 3"), "again"), stored()


@job("plans")
def _(session: Session) -> dict[str, Ran]:
    return {recipe: session.short(recipe, flags, f"plan-{recipe}") for recipe, flags in PLANS.items()}


@job("few rows")
def _(session: Session) -> Ran:
    return session.run("match_embeddings", "--data {three} --teacher.name {bert} --train.epochs 3", "few")


def stop_and_resume(session: Session, recipe: str, flags: str, number: int, other: str) -> tuple[Ran, Ran, Ran]:
    """Stop a run by a signal, resume it with another recipe, then with the command that it printed."""
    name = f"stopped-{recipe}"
    stopped = session.stopped(recipe, f"{flags} --store stores/{name}", name, number)
    command = shlex.split(stopped.err.partition("To go on:")[2]) or ["false"]
    refused = session.shell([*command, *other.split()], stopped.output)
    return stopped, refused, session.shell(command, stopped.output)


@job("Ctrl-C")
def _(session: Session) -> tuple[Ran, Ran, Ran]:
    flags = "--data {texts} --teacher.name {bert} --train.steps 1500"
    return stop_and_resume(session, "match_embeddings", flags, signal.SIGINT, "--train.seed 1")


@job("SIGTERM")
def _(session: Session) -> tuple[Ran, Ran, Ran]:
    flags = "--teacher {bert} --texts 100 --held-out 20 --steps 1500"
    return stop_and_resume(session, "quickstart", flags, signal.SIGTERM, "--seed 1")


@job("stores")
def _(session: Session) -> dict[str, Ran]:
    """A store met by another teacher, damaged, repaired, and used again."""
    flags = "--data {texts} --teacher.name {bert} --train.steps 1 --store stores/shared"
    ran = {"made": session.run("match_embeddings", flags, "shared")}
    ran["other"] = session.run("match_embeddings", flags.replace("{bert}", "{mpnet}"), "other")
    for shard in (session.folder / "stores" / "shared").glob("rows-*"):
        shard.write_bytes(shard.read_bytes()[:-1])
    ran["damaged"] = session.run("match_embeddings", flags, "damaged")
    repair = re.search(r"`(python -m distill.store repair [^`]*)`", ran["damaged"].err)
    ran["repair"] = session.shell(shlex.split(repair[1]) if repair else ["false"], session.folder)
    ran["repaired"] = session.run("match_embeddings", flags, "repaired")
    return ran


# Good runs


def test_every_recipe_has_a_small_mode() -> None:
    assert {path.stem for path in RECIPES} == set(SMALL)


@pytest.mark.parametrize("recipe", [path.stem for path in RECIPES])
def test_help_fits_two_screens(session: Session, recipe: str) -> None:
    ran = session(f"help {recipe}").all_is_well()
    assert 20 <= len(ran.out.splitlines()) <= 110
    assert max(len(line) for line in ran.out.splitlines()) <= 120
    assert f"accelerate launch recipes/{recipe}.py" in ran.out
    assert "--debug" in ran.out


@pytest.mark.parametrize(("recipe", "variant"), STUDENTS)
@pytest.mark.parametrize("processes", ["one", "two"])
def test_a_run_leaves_a_complete_folder(session: Session, recipe: str, variant: str, processes: str) -> None:
    ran = session(f"{recipe}-{variant}-{processes}").all_is_well()
    found = {"temperature.json"} if variant == "auto" else set()
    assert {
        "recipe.json",
        "metrics.jsonl",
        "report.json",
        "report.html",
        "checkpoints",
        "student",
    } | found == ran.left()
    steps = [entry["step"] for entry in ran.metrics()]
    assert steps == list(range(1, len(steps) + 1))
    report = ran.json("report.json")
    assert report["training"]["steps"] == len(steps)
    assert {"teacher", "untrained start", "student"} <= set(report["scores"])
    assert f"recipes/{recipe}.py" in report["command"]
    assert report["command"].startswith("python" if processes == "one" else "torchrun --nproc-per-node 2")
    assert "keeps of the teacher's scores" in ran.out or recipe == "match_similarities"
    assert ran.out.count("SentenceTransformer(") == 1  # the main process alone speaks
    page = (ran.output / "report.html").read_text(encoding="utf-8")
    assert all(f'id="figure-{name}"' in page for name in ("fidelity", "matrix", "loss", "rate", "size")), page
    table = ran.out[ran.out.index("  teacher") : ran.out.index("The student is in")]
    assert all(len(line) <= 120 for line in table.splitlines()), table


@pytest.mark.parametrize(("recipe", "variant"), STUDENTS)
def test_sentence_transformers_gives_the_vectors_of_the_student(session: Session, recipe: str, variant: str) -> None:
    from sentence_transformers import SentenceTransformer

    path = session(f"{recipe}-{variant}-one").all_is_well().output / "student"
    student, opened = Encoder.from_pretrained(path), SentenceTransformer(str(path), device="cpu")
    for role in (None, "query", "document"):
        theirs = opened.encode(tiny.SENTENCES, prompt_name=role, convert_to_tensor=True)
        assert (theirs - student.encode(tiny.SENTENCES, role=role)).abs().max() <= 1e-5


@pytest.mark.parametrize(("recipe", "variant"), STUDENTS)
def test_two_processes_train_and_score_as_one(session: Session, recipe: str, variant: str) -> None:
    one, two = (session(f"{recipe}-{variant}-{processes}").all_is_well() for processes in ("one", "two"))
    losses = [[entry["loss"] for entry in ran.metrics()] for ran in (one, two)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert len(set(losses[0])) == len(losses[0])  # it moves
    scores = [ran.json("report.json")["scores"] for ran in (one, two)]
    assert scores[0].keys() == scores[1].keys()
    for system, row in scores[0].items():
        for metric, interval in row.items():
            assert scores[1][system][metric] == pytest.approx(interval, abs=1e-4), (system, metric)


def test_a_temperature_found_is_said_recorded_and_that_of_the_loss(session: Session) -> None:
    one, two = (session(f"match_similarities-auto-{processes}").all_is_well() for processes in ("one", "two"))
    found = one.json("temperature.json")
    assert found["temperature"] == pytest.approx(two.json("temperature.json")["temperature"], rel=1e-6)
    assert (found["perplexity"], found["columns"]) == (8, 40)
    line = f"temperature {found['temperature']:.4g}: there a row of the teacher has perplexity 8 over 40 texts"
    assert one.out.count(line) == two.out.count(line) == 1
    fixed = session("match_similarities-static-one").all_is_well()
    assert [entry["loss"] for entry in one.metrics()] != [entry["loss"] for entry in fixed.metrics()]
    card = (one.output / "student" / "README.md").read_text()
    assert f"temperature={found['temperature']}" in card


def test_two_processes_write_one_store(session: Session) -> None:
    session("match_embeddings-static-two").all_is_well()
    store = Store.open(session.folder / "stores" / "match_embeddings-static-two")
    texts = [json.loads(line)["text"] for line in Path(session.names["texts"]).read_text().splitlines()]
    assert (store.find(text_keys(texts)) >= 0).all()
    assert len({bytes(key) for key in store.keys}) == len(store)


@pytest.mark.parametrize("processes", ["one", "two"])
def test_evaluate_compares_models_in_pairs(session: Session, processes: str) -> None:
    ran = session(f"evaluate-all-{processes}").all_is_well()
    bert, mpnet = session.names["bert"], session.names["mpnet"]
    scores = ran.json("report.json")["scores"]
    assert {"teacher", str(bert), str(mpnet)} <= set(scores)
    assert scores[str(bert)]["cosine to teacher"]["value"] == pytest.approx(1, abs=1e-3)
    (ndcg,) = (metric for metric in scores["teacher"] if metric.endswith("ndcg@10"))
    assert scores[str(bert)][ndcg] == pytest.approx(scores["teacher"][ndcg], abs=1e-3)
    assert f"{bert} - {mpnet}, paired" in ran.out


@pytest.mark.parametrize("processes", ["one", "two"])
def test_evaluate_prints_fidelity_in_full_and_a_p_value_for_each_difference(session: Session, processes: str) -> None:
    ran = session(f"evaluate-all-{processes}").all_is_well()
    bert, mpnet = session.names["bert"], session.names["mpnet"]
    report = ran.json("report.json")
    assert "texts.jsonl: 62 texts from 62 rows (0 empty and 0 duplicates left out)" in report["data"]
    assert ran.out.startswith(f"{report['data']}\n")
    flags = ran.json("recipe.json")["recipe"]["evaluation"]
    retrieval = f"{flags['corpus']}, {flags['queries']}, {flags['qrels']}"
    assert report["scored_on"] == {"sts": flags["sts"][0], "documents": retrieval}
    for name in (bert, mpnet):
        slices = report["fidelity"][name]
        assert [part["by"] for part in slices[:1]] == ["all"]
        assert sum(part["texts"] for part in slices if part["by"] == "margin") == slices[0]["texts"] == 62
        block = ran.out[ran.out.index(f"fidelity of {name} to the teacher") :].partition("\n\n")[0]
        assert len(block.splitlines()) == 1 + 3 + len(slices)
        assert all(len(line) <= 120 for line in block.splitlines()[1:]), block
    assert re.search(r"\nread in [0-9.]+ s, scored in [0-9.]+ s\n", ran.out)
    differences = report["differences"][mpnet]
    assert {"cosine to teacher", "CKA", "effective rank", "similarity spearman"} <= differences.keys()
    cosine = differences["cosine to teacher"]
    assert cosine["low"] <= cosine["value"] <= cosine["high"]
    assert (
        f"  cosine to teacher: {cosine['value']:+.3f} [{cosine['low']:+.3f}, {cosine['high']:+.3f}], p = 0.0001"
        in ran.out
    )


def test_gates_are_judged_last_and_told_in_a_line_each(session: Session) -> None:
    passed = session("match_embeddings-static-two").all_is_well()
    assert passed.out.count("\ngate ") == 2
    assert re.search(r"gate overlap@10>=0: passed, student: neighbour overlap@10 is 0\.\d+ \[", passed.out)
    missed = session("missed")
    assert [line.split(": ")[1][:6] for line in missed.out.splitlines() if line.startswith("gate ")] == [
        "passed",
        "MISSED",
    ]
    assert {"report.json", "report.html", "student"} <= {path.name for path in missed.output.iterdir()}
    assert [gate["passed"] for gate in missed.json("report.json")["gates"]] == [True, False]


@pytest.mark.parametrize("processes", ["one", "two"])
def test_evaluate_leaves_a_page_of_its_models(session: Session, processes: str) -> None:
    ran = session(f"evaluate-all-{processes}").all_is_well()
    page = (ran.output / "report.html").read_text(encoding="utf-8")
    assert "2 models on the same data" in page
    assert all(f'id="figure-{name}"' in page for name in ("retention", "fidelity", "size"))
    assert "passed" in page
    assert ran.out.count("gate ") == 2
    again = session.shell([*PYTHON, "-m", "distill.report", str(ran.output)], ran.output).all_is_well()
    assert (again.out.strip(), (ran.output / "report.html").read_text(encoding="utf-8")) == (
        str(ran.output / "report.html"),
        page,
    )


@pytest.mark.parametrize("variant", ["layers", "sides"])
def test_keep_index_scores_the_four_ways_to_use_it(session: Session, variant: str) -> None:
    ran = session(f"keep_index-{variant}-one").all_is_well()
    table = ran.json("report.json")["scores"]
    systems = ["teacher", "student", "student -> teacher's index", "student -> mixed index"]
    assert {"documents ndcg@10", "documents recall@10"} <= set.intersection(*(set(table[name]) for name in systems))
    assert "untrained start -> mixed index" not in table
    assert "with an index half of whose documents the student added: documents ndcg@10" in ran.out
    values = {name: table[name]["documents ndcg@10"]["value"] for name in systems}
    assert len(set(values.values())) == 4  # four indexes, four numbers
    data = ran.json("report.json")["data"]
    assert re.fullmatch(r"documents: \S+documents\.jsonl: 62 texts .*; queries: \S+queries\.jsonl: 24 texts .*", data)
    assert f"{data}; 12 documents held out\n" in ran.out
    [(seen, count)] = ran.json("report.json")["seen_in_training"].items()
    assert f"among the training texts: {count} {seen}\n" in ran.out
    assert (seen, count > 0) == ("queries of documents", True)


def test_sides_have_prompts_and_limits_of_their_own(session: Session) -> None:
    ran = session("keep_index-sides-one").all_is_well()
    student = Encoder.from_pretrained(ran.output / "student")
    assert (student.prompt("query"), student.prompt("document"), student.max_length) == ("what?", "", 9)
    store = Store.open(session.folder / "stores" / "keep_index-sides-one")
    documents = [json.loads(line)["text"] for line in Path(session.names["documents"]).read_text().splitlines()]
    assert (store.find(text_keys(documents, prompt="Interest rates: ")) >= 0).all()
    queries = [json.loads(line)["text"] for line in Path(session.names["queries"]).read_text().splitlines()]
    teacher = Encoder.from_pretrained(session.names["prompted"])
    teacher.prompts["query"] = "?"
    shorter = truncate_texts(queries, teacher, 5, role="query")
    assert sum(one != other for one, other in zip(shorter, queries, strict=True)) > 0
    assert (store.find(text_keys(shorter, prompt="?")) >= 0).all()
    assert store.fingerprint["max_length"] == teacher.max_length


@pytest.mark.parametrize("job", ["classify-all-one", "classify-all-two", "launched"])
def test_classify_reports_its_accuracy(session: Session, job: str) -> None:
    ran = session(job).all_is_well()
    report = ran.json("report.json")
    assert report == session("classify-all-one").json("report.json") | {"command": report["command"]}
    assert ran.left() == {"recipe.json", "report.json", "head"}
    assert "requires_grad" not in ran.err
    head, names = load_head(ran.output / "head")
    texts, labels = zip(*read_labelled(session), strict=True)
    found = head(Encoder.from_pretrained(session.names["bert"]).encode(texts))["logits"].argmax(dim=1).tolist()
    right = [names[one] == label for one, label in zip(found, labels, strict=True)]
    assert sum(right) / len(right) == pytest.approx(report["accuracy"]["value"])
    assert report["accuracy"]["low"] <= report["accuracy"]["value"] <= report["accuracy"]["high"]
    assert report["accuracy"]["value"] > 2 / report["classes"]
    assert report["test_texts_seen_in_training"] == report["train_texts"] < len(texts)
    assert f"{report['train_texts']} test texts are among those of training" in ran.out
    assert report["data"] == ", ".join([session.names["labelled"]] * 2)
    assert f"accuracy {report['accuracy']['value']:.3f}" in ran.out


@pytest.mark.parametrize("processes", ["one", "two"])
def test_classify_trains_encoder_and_head_and_leaves_both(session: Session, processes: str) -> None:
    ran = session(f"classify-together-{processes}").all_is_well()
    report, (head, names) = ran.json("report.json"), load_head(ran.output / "head")
    left = {"recipe.json", "report.json", "student", "head", "metrics.jsonl"}
    assert ran.left() == left
    assert "requires_grad" not in ran.err
    assert head.weight.shape == (len(names), Encoder.from_pretrained(ran.output / "student").width)
    assert len(names) == report["classes"]
    assert head.sigma.item() == report["sigma"]
    assert ran.metrics()[0]["loss/teacher"] == pytest.approx(0, abs=1e-5)  # read with the prompt, as its teacher does
    assert report["cosine_to_teacher"]["before"] == pytest.approx(1, abs=1e-4)  # it is its own teacher
    assert 0.5 < report["cosine_to_teacher"]["after"] < 1
    steps, alone = ran.metrics(), session("classify-together-one").metrics()
    assert steps[0]["loss"] > steps[-1]["loss"]
    assert [step["loss"] for step in steps] == pytest.approx([step["loss"] for step in alone], rel=1e-3)


@pytest.mark.parametrize("processes", ["one", "two"])
def test_incremental_compares_ways_to_learn_classes(session: Session, processes: str) -> None:
    ran = session(f"incremental-all-{processes}").all_is_well()
    ways = ran.json("report.json")["ways"]
    assert ran.json("report.json")["data"] == ", ".join([session.names["labelled"]] * 2)
    assert list(ways) == ["fine-tuning", "fixed proxies", "less-forget", "frozen encoder"]
    for name, way in ways.items():
        assert [[len(row) for row in matrix] for matrix in way["accuracy of each task"]] == [[1, 2, 3], [1, 2, 3]]
        average = way["average incremental accuracy"]
        assert average == pytest.approx([sum(seen) / 3 for seen in way["accuracy after each task"]])
        assert f"| {name} | {sum(average) / 2:.3f} ({min(average):.3f} to {max(average):.3f}) |" in ran.out
    assert ways["frozen encoder"] == session("incremental-all-one").json("report.json")["ways"]["frozen encoder"]
    assert ran.left() == {
        "recipe.json",
        "report.json",
        "accuracy.svg",
        "matrices.svg",
    }


def test_bench_losses_shows_what_it_measured(session: Session) -> None:
    ran = session("bench_losses-all-one").all_is_well()
    assert ran.left() == {"recipe.json", "bench.json"}
    report = ran.json("bench.json")
    rows = report["rows"]
    shapes = [(row["case"]["loss"], row["case"]["rows"], row["case"]["columns"]) for row in rows]
    banks = [("cross_contrastive", 24, columns) for columns in (24, 40) for _ in range(2 * 5)]
    assert shapes == [*banks, *[("gram_mse", 24, 24)] * 4, *[("rank_hinge", 24, 24)] * 4]
    assert [row["arm"] for row in rows[:5]] == ["2 x torch.mm", "naive", "attention", "one-tile", "distill"]
    for row in rows:
        assert len(row["milliseconds"]) == 2
        assert min(row["milliseconds"]) > 0
        assert row["arm"] == "2 x torch.mm" or row["extra_bytes"] is None or row["extra_bytes"] < 2**25
        assert row["arm"] != "distill" or row["error"] < 1e-4
    assert report["left_out"] == ["liger-kernel: runs on CUDA alone"]
    assert "Left out: liger-kernel: runs on CUDA alone." in ran.out
    table = [line for line in ran.out.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(rows)
    assert "recipes/bench_losses.py" in ran.out.splitlines()[len(table) + 1]


def test_bench_pipeline_shows_what_it_measured(session: Session) -> None:
    ran = session("bench_pipeline-all-one").all_is_well()
    report = ran.json("bench.json")
    arms = {
        part: [row["arm"] for row in report["rows"] if row["part"] == part] for part in ("teacher", "step", "static")
    }
    assert arms["teacher"] == ["distill", "distill, into a new store", "sentence-transformers"]
    assert arms["step"][:3] == ["distill", "distill, --train.mixed-precision bf16", "sentence-transformers"]
    assert arms["static"][1:3] == ["distill", "sentence-transformers"]
    for row in report["rows"]:
        assert len(row["seconds"]) == len(row["times"]) == 2
        assert min(row["seconds"]) > 0
        assert row["times"] == [1, 1] or row["arm"] not in ("distill, Store.take", arms.get(row["part"], [""])[0])
        assert row["compared"] is None or row["compared"] < {"teacher": 1e-3, "reading": 1e-9}.get(row["part"], 1)
    left_out = {line.split(":")[0] for line in report["left_out"]}
    assert ("tokenlearn" in left_out) is ("tokenlearn" not in arms["static"])
    assert len([line for line in ran.out.splitlines() if line.startswith("|")]) == 2 + len(report["rows"])
    assert "recipes/bench_pipeline.py" in ran.out


@pytest.mark.parametrize("recipe", MEASURING)
def test_what_measures_is_of_one_process(session: Session, recipe: str) -> None:
    ran = session(f"{recipe}-all-two")
    assert f"error: {recipe} measures one process: add --num_processes 1" in ran.err


def test_ablate_measures_each_variant_beside_the_recipe_as_given(session: Session) -> None:
    ran = session("ablate-all-one").all_is_well()
    report = ran.json("ablate.json")
    names = ["as given", "train.bank-size=12", "loss.kl=1,student.width=4"]
    assert list(report["runs"]) == names
    assert all([run["steps"] for run in runs] == [6, 6] for runs in report["runs"].values())
    scores = [found["scores"] for found in report["scores"]]
    for metric, (value, low, high) in report["differences"][names[2]].items():
        change = [found[names[2]][metric]["value"] - found[names[0]][metric]["value"] for found in scores]
        assert value == pytest.approx(sum(change) / 2, abs=1e-6)
        assert low <= value <= high
    assert scores[0][names[1]]["cosine to teacher"] != scores[0][names[0]]["cosine to teacher"]
    assert scores[1][names[0]]["cosine to teacher"] != scores[0][names[0]]["cosine to teacher"]  # another seed
    assert "| train.bank-size=12 |" in ran.out


def test_compare_peers_trains_each_from_one_start_for_one_time(session: Session) -> None:
    ran = session("compare_peers-all-one").all_is_well()
    report = ran.json("compare.json")
    trainers = ["distill", "sentence-transformers, EmbedDistillLoss", "sentence-transformers, MSELoss"]
    assert ["untrained start", *trainers] == [
        name for name in report["runs"] if name not in ("model2vec", "tokenlearn")
    ]
    assert {"model2vec", "tokenlearn"} - set(report["runs"]) == set(report["left_out"])
    [start] = report["runs"]["untrained start"]  # of the first seed
    assert [len(report["runs"][name]) for name in trainers] == [2, 1, 1]
    for name in trainers:
        assert all(run["parameters"] == start["parameters"] for run in report["runs"][name])
        assert all(run["steps"] > 1 and 0.1 < run["seconds"] < 3 for run in report["runs"][name])  # .6 asked for
    [untrained], ours, [theirs] = (
        [one["scores"][name]["cosine to teacher"]["value"] for one in report["scores"] if name in one["scores"]]
        for name in ("untrained start", *trainers[:2])
    )
    assert min(*ours, theirs) > untrained
    lines = [line for line in ran.out.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:6]] == ["teacher", "untrained start", *trainers[:2]]
    mean = sum(ours) / len(ours)
    assert f"| {mean:.3f} ±" in next(line for line in lines if line.startswith("| distill"))
    assert "recipes/compare_peers.py" in ran.out


def test_a_second_run_computes_no_teacher_vector_and_starts_over(session: Session) -> None:
    first, before, second, after = session("again")
    first.all_is_well()
    second.all_is_well()
    assert before == after
    assert "holds an earlier run, which this one replaces" in second.err
    assert [entry["step"] for entry in second.metrics()] == [1, 2, 3]
    assert second.json("report.json")["training"]["steps"] == second.json("recipe.json")["recipe"]["steps"] == 3
    assert sorted(path.name for path in (second.output / "checkpoints").iterdir()) == ["step-00000002", "step-00000003"]
    assert not (second.output / "student" / "left-over.txt").exists()


def test_a_plan_is_printed_in_the_place_of_a_run(session: Session) -> None:
    for ran in session("plans").values():
        ran.all_is_well()
        for title in ("Memory on cpu, each process", "Disk", "Time, from a rehearsal of 20 steps"):
            assert f"\n{title}\n" in ran.out
        assert ran.out.count("together") == 3
        assert not ran.output.exists()


def test_fewer_rows_than_a_batch_is_a_run(session: Session) -> None:
    ran = session("few rows").all_is_well()
    assert [entry["texts"] for entry in ran.metrics()] == [3, 3, 3]


# Bad input


@pytest.mark.parametrize("case", list(BAD))
def test_bad_input_is_one_message_with_its_exit_code(session: Session, case: str) -> None:
    _, _, code, parts = BAD[case]
    ran = session(case)
    assert ran.code == code, ran.err
    for part in parts:
        assert part in ran.err
    assert "Traceback" not in ran.err
    assert ran.err.count("error: ") == (case not in ("unknown flag", "no such variant"))


def test_debug_shows_where_it_happened(session: Session) -> None:
    ran = session.run("match_embeddings", "--data {nothing} --debug", "debug")
    assert ran.code == 3
    assert "Traceback" in ran.err
    assert "load_texts" in ran.err


def test_rows_that_are_not_finite_are_written_down(session: Session) -> None:
    report = session("not finite").json("non-finite.json")
    assert report["rows"][0].keys() == {"row", "text"}


def test_a_store_of_another_teacher_is_refused_by_the_fields_that_differ(session: Session) -> None:
    ran = session("stores")
    ran["made"].all_is_well()
    assert ran["other"].code == 4
    for part in ("stores/shared", "weights: store", "modules: store BertModel", "this encoder MPNetModel", "--store"):
        assert part in ran["other"].err


def test_a_damaged_store_is_refused_and_mended_by_the_command_it_names(session: Session) -> None:
    ran = session("stores")
    assert ran["damaged"].code == 4
    assert "rows-" in ran["damaged"].err
    assert ran["repair"].code == 0, ran["damaged"].err
    ran["repaired"].all_is_well()


# Stops


@pytest.mark.parametrize(
    ("job", "code", "field"), [("Ctrl-C", 130, "--train.seed: was 0, is 1"), ("SIGTERM", 143, "--seed: was 0, is 1")]
)
def test_a_stopped_run_goes_on_with_the_command_it_prints(session: Session, job: str, code: int, field: str) -> None:
    stopped, refused, resumed = session(job)
    assert stopped.code == code, stopped.err
    steps = int(re.search(r"stopped after step (\d+) of 1500", stopped.err)[1])  # type: ignore[index]
    assert steps < 1500
    assert "Traceback" not in stopped.err
    assert refused.code == 4
    assert field in refused.err
    resumed.all_is_well()
    assert [entry["step"] for entry in resumed.metrics()] == list(range(1, 1501))
    assert resumed.json("report.json")["training"]["steps"] == 1500
