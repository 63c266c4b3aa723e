"""The command: runs a recipe twice, kills and resumes it once, and has the two compared."""

import argparse
import dataclasses
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_type_hints

from distill.errors import DistillError, IntegrityError, RecipeError, reported
from distill.verify_resume.comparing import compare, last_logged, saved_steps


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A recipe, its flags, and how it is to be run. `group` is what its training flags begin with, "--train." or "--"."""

    recipe: Path
    arguments: tuple[str, ...]
    group: str
    saves: bool  # whether it has save_every and keep_checkpoints
    steps: int
    kills: int
    processes: int

    def command(self, output: Path, *, resume: bool) -> list[str]:
        flags = {"steps": self.steps} | (
            {"save-every": self.every, "keep-checkpoints": self.steps} if self.saves else {}
        )
        given = [item for name, value in flags.items() for item in (f"{self.group}{name}", str(value))]
        given += [f"{self.group}resume"] if resume else []
        return [sys.executable, str(self.recipe), *self.arguments, "--output", str(output), *given]

    @property
    def every(self) -> int:
        """Steps between checkpoints: behind each but the last there may be a kill."""
        return max(1, self.steps // (self.kills + 1))


class RunFailed(DistillError):
    """The recipe itself ended with an error; its exit code is this one's."""

    def __init__(self, code: int, log: Path):
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
        super().__init__(f"the recipe ended with exit code {code}:\n{tail}")
        self.exit_code = code if code > 0 else 1


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        return reported(partial(_try, options))
    except KeyboardInterrupt:
        return 130


def _try(options: argparse.Namespace) -> int:
    trial = _trial(options)
    with _working_folder(options.folder) as folder:
        return _verify(trial, folder)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m distill.verify_resume",
        description="Kill and resume a recipe's run, and compare it, bit for bit, with one that was never stopped.",
    )
    parser.add_argument("--steps", type=int, default=12, help="optimizer steps of the run (12)")
    parser.add_argument("--kills", type=int, default=1, help="how often it is killed and resumed (1)")
    parser.add_argument("--processes", type=int, default=1, help="processes of the run (1)")
    parser.add_argument(
        "--folder",
        type=Path,
        default=None,
        help="keep the two runs there; by default they are deleted when they are equal",
    )
    parser.add_argument("recipe", type=Path, help="the program, as recipes/match_embeddings.py")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its own flags")
    return parser


def _trial(options: argparse.Namespace) -> Trial:
    if not 1 <= options.kills < options.steps or options.processes < 1:
        raise RecipeError(
            f"--kills is 1 or more and below --steps, --processes 1 or more, got {options.kills}, {options.steps} and "
            f"{options.processes}."
        )
    group, saves = training_flags(options.recipe)
    return Trial(
        recipe=options.recipe,
        arguments=tuple(options.arguments),
        group=group,
        saves=saves,
        steps=options.steps,
        kills=options.kills,
        processes=options.processes,
    )


def training_flags(recipe: Path) -> tuple[str, bool]:
    """What a recipe's flags `steps` and `resume` begin with, and whether it has `save_every`. Imports the recipe.

    RecipeError for one that cannot be imported, and for a program without a dataclass that has `output`, and `steps` and `resume` itself or in one of its groups.
    """
    if not recipe.is_file():
        raise RecipeError(f"there is no recipe {recipe}.")
    spec = importlib.util.spec_from_file_location("recipe_to_verify", recipe)
    if spec is None or spec.loader is None:
        raise RecipeError(f"{recipe} is no Python program.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(recipe.resolve().parent))  # as Python does for a program that it runs
    try:
        spec.loader.exec_module(module)
    except (SyntaxError, ImportError) as error:
        raise RecipeError(f"{recipe} cannot be imported: {error}.") from error
    finally:
        sys.path.pop(0)
    for kind in vars(module).values():
        if not dataclasses.is_dataclass(kind) or getattr(kind, "__module__", "") != spec.name:
            continue
        hints = get_type_hints(kind)
        fields = {field.name: hints[field.name] for field in dataclasses.fields(kind)}
        for prefix, names in [("--", set(fields)), *_groups(fields)]:
            if "output" in fields and {"steps", "resume"} <= names:
                return prefix, "save_every" in names
    raise RecipeError(
        f"{recipe} has no dataclass with `output`, and with `steps` and `resume` in it or in a group as TrainConfig; "
        "without these flags a run can be neither shortened nor resumed."
    )


def _groups(fields: dict[str, Any]) -> Iterator[tuple[str, set[str]]]:
    for name, kind in fields.items():
        if dataclasses.is_dataclass(kind):
            yield f"--{name.replace('_', '-')}.", {field.name for field in dataclasses.fields(kind)}


@contextmanager
def _working_folder(named: Path | None) -> Iterator[Path]:
    """A folder for the two runs; one that nobody named is deleted unless something went wrong."""
    if named is not None:
        if named.exists() and any(named.iterdir()):
            raise RecipeError(f"{named} is not empty. Name a new folder.")
        named.mkdir(parents=True, exist_ok=True)
        yield named
        return
    folder = Path(tempfile.mkdtemp(prefix="verify-resume-"))
    try:
        yield folder
    except BaseException:
        print(f"both runs are in {folder}", file=sys.stderr)
        raise
    shutil.rmtree(folder)


def _verify(trial: Trial, folder: Path) -> int:
    whole, killed = folder / "undisturbed", folder / "killed"
    for output in (whole, killed):
        output.mkdir()
    many = f"{trial.processes} processes" if trial.processes > 1 else "1 process"
    _run(trial, whole, lambda: _reached(whole, trial.steps, trial.steps), resume=False)
    print(f"undisturbed: {last_logged(whole)} steps, {many}", flush=True)
    for kill in range(trial.kills):
        target = trial.every * (kill + 1)
        _run(trial, killed, lambda target=target: _reached(killed, target, target + 1), resume=kill > 0)  # type: ignore[misc]
        at, left = last_logged(killed), _back_to(killed, target, trial.steps)
        print(f"killed after step {at}, resumed from step {left}", flush=True)
    _run(trial, killed, lambda: _reached(killed, trial.steps, trial.steps), resume=True)
    compared = compare(whole, killed)
    print(f"equal, bit for bit: {compared}")
    return 0


def _run(trial: Trial, output: Path, until: Callable[[], bool], *, resume: bool) -> None:
    """Start the recipe's processes and kill them (SIGKILL) as soon as `until()`. RunFailed if one of them fails before."""
    log = output.with_suffix(".log")
    started = _start(trial, trial.command(output, resume=resume), log)
    try:
        while not until():
            codes = [process.poll() for process in started]
            if any(codes):
                time.sleep(1)  # for what the others have to say
                raise RunFailed(next(code for code in codes if code), log)
            if None not in codes and not until():
                raise IntegrityError(
                    f"the recipe ended well without the checkpoint of step {trial.steps} in {output / 'checkpoints'}: does it "
                    "pass its output folder and its training settings to train()?"
                )
            time.sleep(0.002)
    finally:
        for process in started:
            process.kill()
        for process in started:
            process.wait()


def _start(trial: Trial, command: list[str], log: Path) -> list[subprocess.Popen[bytes]]:
    environment, world = dict(os.environ), trial.processes
    if world > 1:
        environment.setdefault("OMP_NUM_THREADS", "1")
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        environment |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    with log.open("ab") as out:
        return [
            subprocess.Popen(command, env=environment | _ranks(rank, world), stdout=out, stderr=out)
            for rank in range(world)
        ]


def _ranks(rank: int, world: int) -> dict[str, str]:
    return {"RANK": str(rank), "LOCAL_RANK": str(rank)} if world > 1 else {}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _reached(output: Path, saved: int, logged: int) -> bool:
    """Whether a run has got that far, or to a later checkpoint."""
    steps = saved_steps(output)
    return bool(steps) and (steps[-1] > saved or (steps[-1] == saved and last_logged(output) >= logged))


def _back_to(output: Path, target: int, last: int) -> int:
    """A run that was faster than the kill is set back, to the checkpoint `target` if there is one. The step it goes on from."""
    steps = saved_steps(output)
    wanted = [step for step in steps if step <= target] or [step for step in steps if step < last]
    if not wanted:
        raise IntegrityError(f"{output} reached its end before it could be killed. Give more --steps.")
    for step in steps:
        if step > wanted[-1] and step >= last:
            shutil.rmtree(output / "checkpoints" / f"step-{step:08d}")
    return saved_steps(output)[-1]


if __name__ == "__main__":
    sys.exit(main())
