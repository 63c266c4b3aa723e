"""recipe.json: the flags that a run's folder was begun with, and whether it is resumed with the same."""

import json
import sys
from collections.abc import Collection, Iterator
from dataclasses import MISSING, asdict, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

from distill import distributed, files, run_lock
from distill.errors import IntegrityError, RecipeError, ResourceError, explained
from distill.export import this_command
from distill.folder import refuse_other_files
from distill.page import REPORT
from distill.tables.sources import without_revision
from distill.training.checkpoint import RECIPE

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
# Flags that are compared with their whole path: a checkpoint knows its student by the names and shapes of the weights alone.
NEVER_MOVED = ("--student.name",)


def record(recipe: Any, output: Path, *, leaves: Collection[str] = ("student",), quiet: bool = False) -> None:
    """Write the resolved recipe and the command into the run's folder, so that it can be run again.

    IntegrityError if the recipe is to resume a run that was begun with other flags. `leaves` are the models that the run puts
    into the folder, "student" and "head": RecipeError if one that is there would stay beside the result. `quiet`: an earlier
    run is replaced without a word. A --plan writes nothing. The folder is then this process's until it ends (`run_lock`).
    """
    if getattr(recipe, "plan", False):
        return
    distributed.main_first(partial(_record, recipe, output, leaves, quiet))


def _record(recipe: Any, output: Path, leaves: Collection[str], quiet: bool) -> None:
    value = {"command": this_command(), "recipe": json.loads(json.dumps(asdict(recipe), default=str))}
    path, beside = output / RECIPE, output / "checkpoints" / RECIPE
    try:
        refuse_other_files(output / "student")
        refuse_other_files(output / "head", "head")
        if not _begun(output):
            _refuse_foreign(output)
        run_lock.take(output)
        begun = _begun(output)
        if "student" in leaves:
            _refuse_its_own_source(output / "student", value["recipe"])
        trains = "student" in leaves and bool({"train", "resume"} & value["recipe"].keys())
        _refuse_what_would_stay(output, leaves, checkpoints=begun and not trains)
        first = beside if beside.exists() else path
        resumed = begun and first.exists() and _resumes(value["recipe"])
        if resumed:
            _refuse_other_recipe(output, _begun_with(first), value["recipe"], _defaults(recipe))
        elif not quiet and (begun or (output / "student").exists()):
            print(
                f"{output} holds an earlier run, which this one replaces (its student, when the new one is done).",
                file=sys.stderr,
            )
        if begun and not resumed and first == path and path.exists():
            # What the checkpoints were begun with, should this run fail before it trains.
            with files.published_file(beside) as temporary:
                temporary.write_bytes(path.read_bytes())
        for name in (RECIPE, REPORT, "non-finite.json"):
            files.remove_unfinished(output, name)
        files.write_json(path, value)
        (output / "non-finite.json").unlink(missing_ok=True)
    except OSError as error:
        raise ResourceError(f"{explained(error)} Name a folder you may write to with --output.") from error


def _begun(output: Path) -> bool:
    return any((output / "checkpoints").glob("step-*"))


def _refuse_what_would_stay(output: Path, leaves: Collection[str], *, checkpoints: bool) -> None:
    """RecipeError if the folder has a model, or checkpoints, of a run that this one would replace in part."""
    stay = [name for name in ("student", "head") if name not in leaves and (output / name).exists()]
    stay += ["checkpoints"] if checkpoints else []
    if stay:
        raise RecipeError(
            f"{output} holds a training run, of which this would overwrite a part and leave the rest ({', '.join(stay)}); "
            "name another --output."
        )


def _refuse_its_own_source(student: Path, recipe: dict[str, Any]) -> None:
    """RecipeError if the student would take the place of a model that the run is made from: its teacher, or its start."""
    for flag, value in _flags(recipe) if student.exists() else ():
        for name in value if isinstance(value, list) else [value]:
            if isinstance(name, str) and Path(name).resolve() == student.resolve():
                raise RecipeError(
                    f"{flag} {name} would be overwritten by this run's own student: name another --output."
                )


def _refuse_foreign(output: Path) -> None:
    """RecipeError if recipe.json, or a report.json without one beside it, is not of a run."""
    if (output / RECIPE).exists():
        try:
            _begun_with(output / RECIPE)
        except IntegrityError as error:
            raise RecipeError(
                f"{output / RECIPE} would be overwritten, and is not that of a run of distill. Delete it, or name another --output."
            ) from error
    elif (output / REPORT).exists():
        raise RecipeError(
            f"{output / REPORT} would be overwritten, and no {RECIPE} beside it says that it is one of distill's. Delete it, or "
            "name another --output."
        )


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
        if _comparable(name, was.get(name)) != _comparable(name, is_.get(name))
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


def _comparable(flag: str, value: Any) -> Any:
    """A path by its last part, a Hub data set without its revision: the same may lie elsewhere, or go by its commit.

    What is in it, the checkpoint knows; but for the flags of NEVER_MOVED, which are compared as they are.
    """
    if isinstance(value, list):
        return [_comparable(flag, item) for item in value]
    return Path(without_revision(value)).name if isinstance(value, str) and flag not in NEVER_MOVED else value


def _resumes(recipe: dict[str, Any]) -> bool:
    return bool(recipe.get("resume") or recipe.get("train", {}).get("resume"))
