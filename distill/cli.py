"""A recipe's dataclass becomes its flags; what goes wrong becomes one message and an exit code.

0 done · 2 usage or recipe · 3 data · 4 store or checkpoint integrity · 5 numerics · 6 environment · 7 done, but a --gate was
missed · 130 Ctrl-C · 143 SIGTERM.
"""

import atexit
import errno
import io
import itertools
import json
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import MISSING, asdict, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from distill import distributed, files, manual
from distill.errors import DistillError, IntegrityError, RecipeError, ResourceError, Stopped
from distill.export import this_command

Recipe = TypeVar("Recipe")
WRONG = "\n\nWhat goes wrong is told in one message; --debug adds the traceback."
# Flags that may differ between a run and its continuation: they change no step of the training.
FREE_TO_CHANGE = (
    "resume",
    "output",
    "store",
    "evaluation",
    "gate",
    "save_every",
    "keep_checkpoints",
    "trackers",
    "micro_batch",
    "gradient_checkpointing",
    "read_ahead",
    "plan",
)


def run(main: Callable[[Recipe], None], recipe_type: type[Recipe], arguments: Sequence[str] | None = None) -> NoReturn:
    """Parse the flags into `recipe_type`, join the other processes, call `main`, and exit with the code of what happened.

    `--debug` shows the traceback of an error. Does not return.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    _exit(_run(main, recipe_type, [argument for argument in arguments if argument != "--debug"], debug))


def _exit(code: int) -> NoReturn:
    """Leave; one of several processes without the interpreter's teardown, which now and then aborts on a thread of gloo's.

    Seen once in 20 runs of two processes on a busy machine (torch 2.13): all was written, then SIGABRT and exit code 1.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        sys.exit(code)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _run(main: Callable[[Recipe], None], recipe_type: type[Recipe], arguments: list[str], debug: bool) -> int:
    recipe = None
    try:
        with _terminable():
            description = main.__doc__ or sys.modules[main.__module__].__doc__ or ""
            recipe = _parse(recipe_type, arguments, description.rstrip() + WRONG)
            distributed.device()
            distributed.use_all_cores()
            _warn_of_one_process()
            main(recipe)
            distributed.finish()
        return 0
    except Stopped as error:
        return _report(error, f"{str(error).partition('. ')[0]}.{_way_on(recipe)}", error.exit_code, debug)
    except DistillError as error:
        return _report(error, str(error), error.exit_code, debug)
    except OSError as error:
        return _report(error, _explain(error) + _way_on(recipe), ResourceError.exit_code, debug)
    except RuntimeError as error:
        if not distributed.lost_another(error):
            raise
        message = f"another process of this run is gone; what it said last is the cause. What was saved stays.{_way_on(recipe)}"
        return _report(error, message, ResourceError.exit_code, debug)
    except KeyboardInterrupt as error:
        return _report(error, f"interrupted; what was saved stays.{_way_on(recipe)}", 128 + signal.SIGINT, debug)


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM raises Stopped, wherever it comes; the training loop has its own handler, which finishes the step first."""

    def stop(*_: object) -> None:
        raise Stopped("terminated; what was saved stays", 128 + signal.SIGTERM)

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread: its owner handles signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def varied(recipe: Recipe, flags: str) -> Recipe:
    """The recipe with some flags given anew, as on a command line: varied(recipe, "--train.ema-decay 0.99")."""
    return _parse(type(recipe), shlex.split(flags), f"A variant: {flags}", default=recipe)


def _parse(recipe_type: type[Recipe], arguments: list[str], description: str, default: Recipe | None = None) -> Recipe:
    import tyro

    shown, told = io.StringIO(), io.StringIO()
    arguments, groups = _asks_for_help(_gathered(arguments, "--gate"))
    try:
        with redirect_stderr(shown), redirect_stdout(told):
            # One form of each flag: no --no-resume beside --resume, no {None} in front of each type.
            config = (tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone)
            start: dict[str, Any] = {} if default is None else {"default": default}
            return tyro.cli(recipe_type, args=arguments, description=description, config=config, **start)
    except SystemExit as stop:
        if error := _recipe_error(stop):
            raise error from None
        if _launched_first():
            print(_readable(shown.getvalue()), end="", file=sys.stderr)
            print(_readable(manual.fitted(told.getvalue(), groups) if groups is not None else told.getvalue()), end="")
        raise


def _readable(text: str) -> str:
    """With an escape for each byte of the command line that is no Unicode, which a stream may refuse to print."""
    return text.encode(errors="backslashreplace").decode()


def _gathered(arguments: list[str], flag: str) -> list[str]:
    """`--gate A --gate B` as `--gate A B`; of a flag that comes twice tyro takes the last one alone."""
    own: list[str] = []
    rest: list[str] = []
    into = rest
    for word in arguments:
        name, _, value = word.partition("=")
        if name == flag:
            own += [value] if value else []
            into = own
            continue
        into = rest if word.startswith("--") else into
        into.append(word)
    return [*rest, flag, *own] if own else arguments


def _asks_for_help(arguments: list[str]) -> tuple[list[str], list[str] | None]:
    """`--help` alone for the parser, and the groups named behind it; None if help is not asked for."""
    place = next((number for number, argument in enumerate(arguments) if argument in ("-h", "--help")), None)
    if place is None:
        return arguments, None
    return ["--help"], list(itertools.takewhile(lambda word: not word.startswith("-"), arguments[place + 1 :]))


def _recipe_error(stop: SystemExit) -> RecipeError | None:
    """The RecipeError that a __post_init__ raised and tyro made a box of, under the name of its group of flags."""
    group, cause = "", stop.__context__
    while cause is not None and not isinstance(cause, RecipeError):
        group, cause = getattr(cause, "arg", group), cause.__context__
    if cause is None or not isinstance(group, str) or str(cause).startswith("--") or not group:
        return cause
    return RecipeError(f"--{group}: {cause}")


def record(recipe: Any, output: Path) -> None:
    """Write the resolved recipe and the command into the run's folder, so that it can be run again.

    IntegrityError if the recipe is to resume a run that was begun with other flags. A --plan writes nothing.
    """
    if getattr(recipe, "plan", False):
        return
    distributed.main_first(partial(_record, recipe, output))


def _record(recipe: Any, output: Path) -> None:
    value = {"command": this_command(), "recipe": json.loads(json.dumps(asdict(recipe), default=str))}
    path = output / "recipe.json"
    try:
        begun = any((output / "checkpoints").glob("step-*"))
        if begun and not {"train", "resume"} & value["recipe"].keys():
            raise RecipeError(f"{output} holds a training run, which this would overwrite; name another --output.")
        if begun and path.exists() and _resumes(value["recipe"]):
            _refuse_other_recipe(output, _begun_with(path), value["recipe"], _defaults(recipe))
        elif begun or (output / "student").exists():
            print(
                f"{output} holds an earlier run, which this one replaces (its student, when the new one is done).",
                file=sys.stderr,
            )
        for name in ("recipe.json", "report.json", "non-finite.json"):
            files.remove_unfinished(output, name)
        files.write_json(path, value)
        (output / "non-finite.json").unlink(missing_ok=True)
    except OSError as error:
        raise ResourceError(f"{_explain(error)} Name a folder you may write to with --output.") from error


def _begun_with(path: Path) -> dict[str, Any]:
    """The recipe that a run's recipe.json records."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["recipe"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise IntegrityError(
            f"{path} is damaged ({type(error).__name__}: {error}), so it cannot be seen whether the run was begun with these flags. "
            "Delete it to resume without that check: the checkpoint still refuses other training settings, texts or models."
        ) from error


def _defaults(recipe: Any) -> dict[str, Any]:
    """A recipe's flags where nobody gives one, as recipe.json has them; one that has to be given is not there."""
    given = {
        field.name: field.default if field.default_factory is MISSING else field.default_factory()
        for field in fields(recipe)
        if field.default is not MISSING or field.default_factory is not MISSING
    }
    plain = {name: asdict(value) if is_dataclass(value) else value for name, value in given.items()}  # type: ignore[arg-type]
    return dict(json.loads(json.dumps(plain, default=str)))


def _refuse_other_recipe(output: Path, before: dict[str, Any], now: dict[str, Any], defaults: dict[str, Any]) -> None:
    """A flag that the run's recipe.json lacks did not exist when it was begun: then it ran as the flag's default has it."""
    was, is_ = dict(_flags(defaults)) | dict(_flags(before)), dict(_flags(now))
    differing = [
        f"\n  {name}: was {was.get(name)}, is {is_.get(name)}"
        for name in dict.fromkeys([*was, *is_])
        if _moved(was.get(name)) != _moved(is_.get(name))
    ]
    if differing:
        raise IntegrityError(
            f"{output} holds a run of another recipe. What differs:{''.join(differing)}\n"
            "Resume with the same flags, or name another folder with --output."
        )


def _flags(recipe: dict[str, Any], prefix: str = "--") -> Iterator[tuple[str, Any]]:
    for name, value in recipe.items():
        if name in FREE_TO_CHANGE:
            continue
        flag = prefix + name.replace("_", "-")
        if isinstance(value, dict):
            yield from _flags(value, flag + ".")
        else:
            yield flag, value


def _moved(value: Any) -> Any:
    """A path by its last part: the same file may lie elsewhere today. What is in it, the checkpoint knows."""
    if isinstance(value, list):
        return [_moved(item) for item in value]
    return Path(value).name if isinstance(value, str) else value


def _resumes(recipe: dict[str, Any]) -> bool:
    return bool(recipe.get("resume") or recipe.get("train", {}).get("resume"))


def say(*lines: object) -> None:
    """Print on the main process."""
    if distributed.is_main():
        print(*lines, flush=True)


def _way_on(recipe: Any) -> str:
    """The command that goes on with a run which stopped half-way."""
    if recipe is None:
        return ""
    flag = "--resume" if hasattr(recipe, "resume") else "--train.resume" if hasattr(recipe, "train") else ""
    command = this_command()
    more = f" {flag}" if flag and flag not in shlex.split(command) else ""
    return f" To go on:\n  {command}{more}"


def _warn_of_one_process() -> None:
    """`accelerate launch --cpu --num_processes N` sets an address to meet at, and starts one process."""
    launched = {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= os.environ.keys() and "WORLD_SIZE" not in os.environ
    if launched and distributed.world_size() == 1:
        print(
            "Several processes were asked for and one was started, as `accelerate launch --cpu` does without an MPI host file. "
            "For N processes on CPUs: accelerate launch --multi_gpu --num_processes N, or torchrun --nproc-per-node N.",
            file=sys.stderr,
        )


def _explain(error: OSError) -> str:
    reason = error.strerror or str(error)
    if error.errno == errno.ENOSPC:
        reason += "; free some space there"
    return f"{error.filename}: {reason}." if error.filename else f"{reason}."


def _launched_first() -> bool:
    """Whether this is the main process, before the processes have met."""
    return os.environ.get("RANK", "0") == "0"


def _report(error: BaseException, message: str, code: int, debug: bool) -> int:
    rank = os.environ.get("RANK", "0")
    print(f"\n{'' if rank == '0' else f'process {rank}: '}error: {message}", file=sys.stderr, flush=True)
    if debug:
        traceback.print_exception(error)
    return code
