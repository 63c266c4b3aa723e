"""A recipe's dataclass becomes its flags; what goes wrong becomes one message and an exit code.

0 done · 2 usage or recipe · 3 data · 4 store or checkpoint integrity · 5 numerics · 6 environment · 130 Ctrl-C · 143 SIGTERM.
"""

import json
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from distill import distributed, files
from distill.errors import DistillError, RecipeError, ResourceError
from distill.export import this_command

Recipe = TypeVar("Recipe")


def run(main: Callable[[Recipe], None], recipe_type: type[Recipe], arguments: Sequence[str] | None = None) -> None:
    """Parse the flags into `recipe_type`, join the other processes, call `main`, and exit with the code of what happened.

    `--debug` shows the traceback of an error. Does not return.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    code = _run(main, recipe_type, [argument for argument in arguments if argument != "--debug"], debug)
    sys.exit(code)


def _run(main: Callable[[Recipe], None], recipe_type: type[Recipe], arguments: list[str], debug: bool) -> int:
    try:
        recipe = _parse(recipe_type, arguments, main.__doc__ or sys.modules[main.__module__].__doc__)
        distributed.device()
        main(recipe)
        distributed.finish()
        return 0
    except DistillError as error:
        return _report(error, error.exit_code, debug)
    except OSError as error:
        return _report(error, ResourceError.exit_code, debug)
    except KeyboardInterrupt:
        return _report("interrupted; what was published stays, the same command goes on from there", 130, debug)


def _parse(recipe_type: type[Recipe], arguments: list[str], description: str | None) -> Recipe:
    import tyro

    try:
        return tyro.cli(recipe_type, args=arguments, description=description)
    except ValueError as error:
        raise RecipeError(str(error)) from error


def record(recipe: Any, output: Path) -> None:
    """Write the resolved recipe and the command into the run's folder, so that it can be run again."""
    value = {"command": this_command(), "recipe": json.loads(json.dumps(asdict(recipe), default=str))}
    distributed.main_first(partial(files.write_json, output / "recipe.json", value))


def say(*lines: object) -> None:
    """Print on the main process."""
    if distributed.is_main():
        print(*lines, flush=True)


def _report(error: BaseException | str, code: int, debug: bool) -> int:
    where = "" if distributed.is_main() else f"process {distributed.rank()}: "
    print(f"\n{where}error: {error}", file=sys.stderr, flush=True)
    if debug and isinstance(error, BaseException):
        traceback.print_exception(error)
    return code
