"""A recipe's dataclass becomes its flags; what goes wrong becomes one message and an exit code.

0 done · 2 usage or recipe · 3 data · 4 store or checkpoint integrity · 5 numerics · 6 environment · 7 done, but a --gate was
missed · 130 Ctrl-C · 143 SIGTERM.
"""

import atexit
import io
import itertools
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import is_dataclass, replace
from typing import Any, NoReturn, TypeVar, get_args, get_origin, get_type_hints

from distill import distributed, manual
from distill.config import StudentConfig, suited
from distill.errors import DistillError, RecipeError, ResourceError, Stopped, explained
from distill.export import this_command
from distill.recording import record as record
from distill.training.settings import TrainConfig

Recipe = TypeVar("Recipe")
WRONG = "\n\nErrors are reported in one message; --debug adds the traceback."


def run(main: Callable[[Recipe], None], recipe_type: type[Recipe], arguments: Sequence[str] | None = None) -> NoReturn:
    """Parse the flags into `recipe_type`, join the other processes, call `main`, and exit with the code of what happened.

    `--debug` shows the traceback of an error. Does not return.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    _exit(_run(main, recipe_type, [argument for argument in arguments if argument != "--debug"], debug))


def _exit(code: int) -> NoReturn:
    """Leave; one of several processes without the interpreter's teardown: after an error the group of processes is still there.

    A thread of gloo's that drops a tensor then aborts it (torch's issue 190489): SIGABRT instead of the code.
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
        kept = str(error).partition(". ")[0]
        if recipe is not None and not _resume_flag(recipe):
            kept = f"{kept.partition(';')[0]}; this recipe cannot resume"
        return _report(error, f"{kept}.{_way_on(recipe)}", error.exit_code, debug)
    except DistillError as error:
        return _report(error, str(error), error.exit_code, debug)
    except OSError as error:
        return _report(error, explained(error) + _way_on(recipe), ResourceError.exit_code, debug)
    except RuntimeError as error:
        if not distributed.lost_another(error):
            raise
        message = f"another process of this run is gone; what it said last is the cause. What was saved stays.{_way_on(recipe)}"
        return _report(error, message, ResourceError.exit_code, debug)
    except KeyboardInterrupt as error:
        return _report(error, f"interrupted; what was saved stays.{_way_on(recipe)}", 128 + signal.SIGINT, debug)


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM raises Stopped, wherever it comes; the training loop has its own handler, which finishes the step first.

    So does any error that follows: a library that is interrupted may make another of it.
    """
    stopped = Stopped("terminated; what was saved stays", 128 + signal.SIGTERM)
    came = False

    def stop(*_: object) -> None:
        nonlocal came
        came = True
        raise stopped

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread: its owner handles signals
        yield
        return
    try:
        yield
    except Exception as error:
        if came and error is not stopped:
            raise stopped from error
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def varied(recipe: Recipe, flags: str) -> Recipe:
    """The recipe with some flags given anew, as on a command line: varied(recipe, "--train.ema-decay 0.99")."""
    try:
        words = shlex.split(flags)
    except ValueError:
        raise RecipeError(
            f"{flags}: a quote is not closed, or a backslash is the end. Put a backslash before a quote that belongs to a value."
        ) from None
    return _parse(type(recipe), words, f"A variant: {flags}", default=recipe)


def _parse(recipe_type: type[Recipe], arguments: list[str], description: str, default: Recipe | None = None) -> Recipe:
    import tyro

    shown, told = io.StringIO(), io.StringIO()
    arguments, groups = _asks_for_help(_gathered(arguments, set(_of_several(recipe_type))))
    try:
        with redirect_stderr(shown), redirect_stdout(told):
            # One form of each flag: no --no-resume beside --resume, no {None} in front of each type.
            config = (tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone)
            start: dict[str, Any] = {"default": default}
            if default is None:
                start, arguments = {}, [*_suited(recipe_type, arguments), *arguments]
            return tyro.cli(recipe_type, args=arguments, description=description, config=config, **start)
    except SystemExit as stop:
        if error := _recipe_error(stop):
            raise error from None
        if _launched_first():
            print(_readable(shown.getvalue()), end="", file=sys.stderr)
            print(_readable(manual.fitted(told.getvalue(), groups) if groups is not None else told.getvalue()), end="")
        raise


def _suited(recipe_type: type[Any], arguments: Sequence[str]) -> list[str]:
    """What the kind of student brings to the flags of a recipe that trains one."""
    groups = {"student": StudentConfig, "train": TrainConfig}
    return suited(arguments) if groups.items() <= get_type_hints(recipe_type).items() else []


def _readable(text: str) -> str:
    """With an escape for each byte of the command line that is no Unicode, which a stream may refuse to print."""
    return text.encode(errors="backslashreplace").decode()


def _gathered(arguments: list[str], flags: Collection[str]) -> list[str]:
    """`--data A --data B` as `--data A B`, for the flags of several values; of one that comes twice tyro takes the last alone."""
    values: dict[str, list[str]] = {}
    rest: list[str] = []
    into = rest
    for word in arguments:
        name, equals, value = word.partition("=")
        if (flag := name.replace("_", "-")) in flags:
            into = values.setdefault(flag, [])
            into += [value] if equals else []
            continue
        into = rest if word.startswith("--") else into
        into.append(word)
    return [*rest, *(word for flag, given in values.items() for word in (flag, *given))]


def _of_several(recipe_type: type[Any], prefix: str = "--") -> Iterator[str]:
    """The flags that take any number of values."""
    for name, hint in get_type_hints(recipe_type).items():
        flag = prefix + name.replace("_", "-")
        if is_dataclass(hint):
            yield from _of_several(hint, f"{flag}.")  # type: ignore[arg-type]  # a class, not an instance
        elif any(get_origin(kind) is tuple and ... in get_args(kind) for kind in (hint, *get_args(hint))):
            yield flag


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


def say(*lines: object) -> None:
    """Print on the main process."""
    if distributed.is_main():
        print(*lines, flush=True)


def _way_on(recipe: Any) -> str:
    """The command that goes on with a run which stopped half-way, or begins it again if its recipe cannot resume."""
    if recipe is None:
        return ""
    flag, command = _resume_flag(recipe), this_command()
    if flag and flag not in shlex.split(command):
        command += f" {flag}"
    return f" To {'go on' if flag else 'begin again'}:\n  {command}"


def _resume_flag(recipe: Any) -> str | None:
    """The flag of a recipe that goes on where its run stopped; None if it has none, or refuses it."""
    if hasattr(recipe, "resume"):
        return "--resume"
    if not hasattr(recipe, "train"):
        return None
    try:
        replace(recipe, train=replace(recipe.train, resume=True))
    except RecipeError:
        return None
    return "--train.resume"


def _warn_of_one_process() -> None:
    """`accelerate launch --cpu --num_processes N` sets an address to meet at, and starts one process."""
    launched = {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= os.environ.keys() and "WORLD_SIZE" not in os.environ
    if launched and distributed.world_size() == 1:
        print(
            "Several processes were asked for and one was started, as `accelerate launch --cpu` does without an MPI host file. "
            "For N processes on CPUs: accelerate launch --multi_gpu --num_processes N, or torchrun --nproc-per-node N.",
            file=sys.stderr,
        )


def _launched_first() -> bool:
    """Whether this is the main process, before the processes have met."""
    return os.environ.get("RANK", "0") == "0"


def _report(error: BaseException, message: str, code: int, debug: bool) -> int:
    rank = os.environ.get("RANK", "0")
    print(f"\n{'' if rank == '0' else f'process {rank}: '}error: {message}", file=sys.stderr, flush=True)
    if debug:
        traceback.print_exception(error)
    return code
