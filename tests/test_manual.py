"""Help that fits: groups in short, whole when asked for, names that are wrong."""

import pytest

from distill import manual
from distill.errors import RecipeError

HEAD = "usage: recipe [OPTIONS]\n\nWhat it does.\n\n"
OWN = " options\n -----   \n  --data STR   Texts. (required)\n\n"
GROUP = " train options\n -----\n  How to train.\n  -----\n{flags}\n"
FLAGS = "".join(f"  --train.flag-{number} INT\n      See --train.flag-0. (default: 3)\n" for number in range(60))
LOSS = " loss options\n -----\n  --loss.kl FLOAT   Its weight.\n\n"
LONG = HEAD + OWN + GROUP.format(flags=FLAGS) + LOSS


def test_what_fits_is_left_but_for_spaces_at_the_ends_of_lines() -> None:
    text = HEAD + OWN + LOSS
    assert manual.fitted(text, []) == text.replace("-----   ", "-----")


def test_what_does_not_fit_names_every_flag_and_the_way_to_more() -> None:
    short = manual.fitted(LONG, [])
    assert len(short.splitlines()) < 30
    assert max(map(len, short.splitlines())) <= manual.WIDTH
    assert short.startswith(HEAD)
    assert "--data STR   Texts. (required)" in short
    assert "--train: How to train.\n" in short
    assert all(f".flag-{number}" in short.split() for number in range(60))
    assert "--loss: \n    .kl" in short
    assert "--help GROUP describes a group's flags, --help all every flag." in short


def test_a_line_of_a_description_that_begins_with_a_flag_is_none() -> None:
    purpose = "  Teachers beside\n  --teacher.\n"
    flags = FLAGS + "  --train.method STR\n        gram: the same in\n        --train.flag-0 numbers.\n"
    text = HEAD + OWN + GROUP.format(flags=flags).replace("  How to train.\n", purpose)
    short = manual.fitted(text, [])
    assert "--train: Teachers beside --teacher.\n" in short
    assert [short.split().count(f".{name}") for name in ("flag-0", "flag-59", "method")] == [1, 1, 1]


def test_a_group_or_all_of_them_are_shown_whole() -> None:
    assert manual.fitted(LONG, ["loss"]) == LOSS
    assert manual.fitted(LONG, ["loss", "train"]) == LOSS + GROUP.format(flags=FLAGS)
    assert manual.fitted(LONG, ["all"]) == LONG.replace("-----   ", "-----")


def test_a_group_that_there_is_not_is_refused_with_those_there_are() -> None:
    with pytest.raises(RecipeError, match="--help knows train, loss, all; got los"):
        manual.fitted(LONG, ["los"])
