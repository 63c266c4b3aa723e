"""Numbers that are too small."""

from distill.errors import RecipeError


def at_least(minimum: int, flag: str, value: int | None) -> None:
    """RecipeError if a number is given and too small."""
    if value is not None and value < minimum:
        raise RecipeError(f"{flag} is {minimum} or more, got {value}.")
