"""Numbers that are too small, and settings that a recipe has no use for."""

from collections.abc import Sequence
from dataclasses import MISSING, fields
from typing import Any

from distill.errors import RecipeError


def at_least(minimum: int, flag: str, value: int | None) -> None:
    """RecipeError if a number is given and too small."""
    if value is not None and value < minimum:
        raise RecipeError(f"{flag} is {minimum} or more, got {value}.")


def unused(group: str, settings: Any, names: Sequence[str], instead: str) -> None:
    """RecipeError if one of these settings of a group of flags is not at its default; `instead` says what takes its place.

    The group "" is the recipe itself.
    """
    prefix = f"--{group}." if group else "--"
    defaults = {
        one.name: one.default if one.default_factory is MISSING else one.default_factory() for one in fields(settings)
    }
    given = [prefix + name.replace("_", "-") for name in names if getattr(settings, name) != defaults[name]]
    if given:
        raise RecipeError(f"{', '.join(given)} would change nothing here: {instead}")
