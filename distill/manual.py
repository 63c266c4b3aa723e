"""--help in two screens: where all flags do not fit, a group of them is only named, and `--help GROUP` shows it whole."""

import itertools
import re
import textwrap
from collections.abc import Sequence

from distill.errors import RecipeError

TWO_SCREENS, WIDTH, ALL = 110, 120, "all"


def fitted(text: str, asked: Sequence[str]) -> str:
    """Help as tyro prints it, shortened if it does not fit; `asked` are groups to show whole. RecipeError names those there are.

    A group begins with a line "NAME options", the recipe's own flags with "options"; a line of dashes follows.
    """
    text = "".join(line.rstrip() + "\n" for line in text.splitlines())
    head, *parts = re.split(r"^(?= (?:[\w.-]+ )?options$)", text, flags=re.MULTILINE)
    groups = {part.split()[0]: part for part in parts}
    own = groups.pop("options", "")
    unknown = [name for name in asked if name not in {ALL, *groups}]
    if unknown:
        raise RecipeError(f"--help knows {', '.join([*groups, ALL])}; got {', '.join(unknown)}.")
    if asked and ALL not in asked:
        return "".join(groups[name] for name in asked)
    if asked or len(text.splitlines()) <= TWO_SCREENS:
        return text
    short = "".join(_short(name, group) for name, group in groups.items())
    return f"{head}{own}{short}\n --help GROUP describes a group's flags, --help {ALL} every flag.\n"


def _short(name: str, group: str) -> str:
    """What the group is for, and the names of its flags."""
    lines, flag = group.splitlines()[2:], f"  --{name}."  # their descriptions stand further in
    purpose = itertools.takewhile(lambda line: not line.startswith((flag, "  ---")), lines)
    flags = [line.split()[0].removeprefix(f"--{name}") for line in lines if line.startswith(flag)]
    names = textwrap.fill(" ".join(flags), WIDTH - 4, break_on_hyphens=False)
    return f" --{name}: {' '.join(map(str.strip, purpose))}\n{textwrap.indent(names, '    ')}\n\n"
