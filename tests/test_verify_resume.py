"""The command that proves a resumed run: it says equal for recipes that are, and finds what a recipe forgets."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import runs
import torch
from safetensors.torch import load_file, save_file

from distill.errors import IntegrityError, RecipeError
from distill.verify_resume.__main__ import main, training_flags
from distill.verify_resume.comparing import compare

ROOT = Path(__file__).resolve().parents[1]
MINE = '''
"""A recipe of one's own; its loss draws from a generator that no checkpoint knows of."""
import random
from dataclasses import dataclass, field
from pathlib import Path
from torch import nn
from distill import cli
from distill.config import StudentConfig, TeacherConfig
from distill.data import load_texts
from distill.embed import embed
from distill.losses import CosineDistance
from distill.training import TrainConfig, match, train

class Noisy(nn.Module):
    def forward(self, student, teacher):
        return CosineDistance()(student, teacher) * (1 + NOISE * random.random())

@dataclass(frozen=True, kw_only=True)
class Mine:
    data: str
    store: Path
    output: Path = Path("runs/mine")
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

def main(recipe: Mine) -> None:
    random.seed(0)
    texts, teacher = load_texts(recipe.data).texts, recipe.teacher.load()
    store = embed(texts, teacher, recipe.store)
    student = StudentConfig(width=8).build(teacher, store, texts)
    train(student, match(texts, student, teacher, store), store, Noisy(), recipe.train, output=recipe.output)

if __name__ == "__main__":
    cli.run(main, Mine)
'''


@pytest.fixture
def flags(tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Flags of a small run, whose processes import this distill, with one thread each."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "texts.txt").write_text("\n".join(runs.texts(60)))
    data = ["--data", tmp_path / "texts.txt", "--store", tmp_path / "store", "--teacher.name", tiny_bert]
    return [*map(str, data), "--train.batch-size", "16"]


def test_a_recipe_of_this_project_is_equal(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = tmp_path / "runs"
    recipe = ["--steps", "6", "--folder", str(folder), str(ROOT / "recipes" / "match_embeddings.py"), *flags]
    more = ["--student.kind", "layers", "--train.dropout", "--train.ema-decay", "0.9"]
    assert main([*recipe, *more]) == 0
    said = capsys.readouterr().out
    assert "undisturbed: 6 steps, 1 process" in said
    assert "resumed from step 3" in said
    assert "equal, bit for bit: 6 logged steps" in said
    assert "tensors of average" in said
    assert main([*recipe, *more]) == 2  # the folder is there already


@pytest.mark.slow
@pytest.mark.parametrize(("noise", "code"), [("1.0", 4), ("0.0", 0)])
def test_a_recipe_of_ones_own_on_two_processes(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture, noise: str, code: int
) -> None:
    (tmp_path / "mine.py").write_text(MINE.replace("NOISE", noise))
    arguments = ["--processes", "2", "--steps", "6", "--kills", "2", "--folder", str(tmp_path / "runs")]
    assert main([*arguments, str(tmp_path / "mine.py"), *flags]) == code
    out, err = capsys.readouterr()
    assert "6 steps, 2 processes" in out
    assert "resumed from step 2" in out
    if code:
        assert "not equal: loss of step 3 is" in err
    else:
        assert "equal, bit for bit" in out


# With a program that does no more than leave the files of a run

BARE = """
import argparse, dataclasses, json, os, pathlib, sys, time
import numpy
from safetensors.numpy import save_file

@dataclasses.dataclass
class Bare:
    output: str = ""
    steps: int = 3
    resume: bool = False

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=pathlib.Path)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--fault")
    given = parser.parse_args()
    folder, rank = given.output / "checkpoints", int(os.environ.get("RANK", "0"))
    if given.fault == "fails":
        sys.exit(5) if rank == int(os.environ.get("WORLD_SIZE", "1")) - 1 else time.sleep(60)
    saved = sorted(int(path.name[5:]) for path in folder.glob("step-*"))
    first = saved[-1] if saved and given.resume and given.fault != "starts over" else 0
    if rank == 0:
        log = given.output / "metrics.jsonl"
        kept = log.read_text().splitlines(keepends=True)[:first] if log.exists() else []
        log.write_text("".join(kept))
        for step in range(first + 1, given.steps + 1):
            value = step + (given.fault == "forgets" and given.resume)
            with log.open("a") as file:
                file.write(json.dumps({"step": step, "loss": float(value)}) + "\\n")
            if given.fault == "no checkpoints":
                continue
            made = given.output / f"being made {step}"
            made.mkdir(parents=True, exist_ok=True)
            save_file({"a": numpy.full(3, value)}, made / "model.safetensors")
            folder.mkdir(exist_ok=True)
            made.rename(folder / f"step-{step:08d}") if not (folder / f"step-{step:08d}").exists() else None
            time.sleep(0.02)
    time.sleep(0 if given.fault == "no checkpoints" else 60)
"""
FAULTS = {
    "none": (0, "equal, bit for bit: 4 logged steps"),
    "forgets": (4, "not equal: loss of step [34] is [34].0 undisturbed"),
    "fails": (5, "the recipe ended with exit code 5"),
    "no checkpoints": (4, "ended well without the checkpoint of step 4"),
}


@pytest.mark.parametrize("processes", ["1", "2"])
@pytest.mark.parametrize("fault", FAULTS)
def test_what_a_program_does_is_told(tmp_path: Path, capsys: pytest.CaptureFixture, fault: str, processes: str) -> None:
    (tmp_path / "bare.py").write_text(BARE.replace("\\\\n", "\\n"))
    arguments = [
        "--steps",
        "4",
        "--processes",
        processes,
        "--folder",
        str(tmp_path / "runs"),
        str(tmp_path / "bare.py"),
    ]
    code, message = FAULTS[fault]
    assert main([*arguments, "--fault", fault]) == code
    assert re.search(message, "".join(capsys.readouterr()))


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("match_embeddings", ("--train.", True)),
        ("keep_index", ("--train.", True)),
        ("quickstart", ("--", False)),
    ],
)
def test_the_flags_of_a_recipe_are_found(program: str, expected: tuple[str, bool]) -> None:
    assert training_flags(ROOT / "recipes" / f"{program}.py") == expected


def test_a_recipe_may_import_a_file_beside_it_and_put_its_annotations_off(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("from distill.training import TrainConfig\n")
    (tmp_path / "mine.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom beside import TrainConfig\n"
        "@dataclass\nclass Recipe:\n    output: str\n    learn: TrainConfig\n"
    )
    assert training_flags(tmp_path / "mine.py") == ("--learn.", True)
    (tmp_path / "other.py").write_text("import a_package_that_is_not_there\n")
    with pytest.raises(RecipeError, match=r"other\.py cannot be imported: .*a_package_that_is_not_there"):
        training_flags(tmp_path / "other.py")


def test_what_cannot_be_resumed_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(RecipeError, match="has no dataclass with `output`, and with `steps` and `resume`"):
        training_flags(ROOT / "recipes" / "classify.py")
    assert main([str(tmp_path / "nothing.py")]) == 2
    assert main(["--kills", "12", str(ROOT / "recipes" / "quickstart.py")]) == 2
    assert "there is no recipe" in capsys.readouterr().err
    (tmp_path / "broken.py").write_text("import sys\ndef main(:\n")
    assert main([str(tmp_path / "broken.py")]) == 2
    assert re.search(r"broken.py cannot be imported: .*line 2", capsys.readouterr().err)


# What counts as a difference


def run_folder(path: Path) -> Path:
    folder = path / "checkpoints" / "step-00000002"
    folder.mkdir(parents=True)
    lines = [{"step": step, "loss": 0.5, "order": "ab", "seconds": 0.1} for step in (1, 2)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name in ("model", "optimizer", "rng"):
        save_file(
            {"a": torch.zeros(3), "b": torch.full((2,), torch.nan), "c": torch.ones(())}, folder / f"{name}.safetensors"
        )
    return path


def _tensor(name: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def apply(run: Path) -> None:
        path = run / "checkpoints" / "step-00000002" / f"{name}.safetensors"
        tensors = {key: value.clone() for key, value in load_file(path).items()}
        change(tensors)
        save_file(tensors, path)

    return apply


def _line(**change: object) -> Callable[[Path], None]:
    def apply(run: Path) -> None:
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line | change) + "\n" for line in lines))

    return apply


def _short(run: Path) -> None:
    (run / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text()[:-5])


def _other_step(run: Path) -> None:
    shutil.move(run / "checkpoints" / "step-00000002", run / "checkpoints" / "step-00000003")


DIFFERENCES = {
    "loss of step 1 is 0.5 undisturbed, 0.25": _line(loss=0.25),
    "order of step 1 is ab": _line(order="cd"),
    "extra of step 1 is None": _line(extra=1),
    "2 steps are logged undisturbed, 1": _short,
    "the last checkpoints are": _other_step,
    r"a of model.safetensors at \[1\] of 3 is 0.0 undisturbed, 1.4": _tensor(
        "model", lambda tensors: tensors["a"].view(torch.int32)[1:2].fill_(1)
    ),
    r"c of rng.safetensors at \[0\] of 1": _tensor("rng", lambda tensors: tensors["c"].neg_()),
    r"a of model.safetensors at \[0\] of 3 is 0.0 undisturbed, -0.0": _tensor(
        "model", lambda tensors: tensors["a"].neg_()
    ),
    "model.safetensors differs in d": _tensor("model", lambda tensors: tensors.update(d=torch.zeros(1))),
    r"is torch.float32 \(3,\), and torch.float64": _tensor(
        "model", lambda tensors: tensors.update(a=torch.zeros(3).double())
    ),
    "a checkpoint holds": lambda run: (run / "checkpoints" / "step-00000002" / "rng.safetensors").unlink(),
}


@pytest.mark.parametrize("message", DIFFERENCES)
def test_every_difference_is_named(tmp_path: Path, message: str) -> None:
    one, two = run_folder(tmp_path / "one"), run_folder(tmp_path / "two")
    _line(seconds=9.0)(two)
    assert "2 logged steps" in compare(one, two)
    DIFFERENCES[message](two)
    with pytest.raises(IntegrityError, match=f"not equal: .*{message}"):
        compare(one, two)
