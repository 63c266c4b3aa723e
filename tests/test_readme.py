"""What the README shows is true: its Python runs, its commands parse, its files, links and names exist.

A block that cannot be tried here stands below a comment, <!-- test: skip REASON -->.
"""

import contextlib
import importlib
import importlib.util
import io
import re
import shlex
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from unittest import mock

import pytest
import runs

from distill import cli
from distill.errors import RecipeError

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCE = re.compile(
    r"(<!-- test: skip (?P<reason>[^>]*?) -->\n+)?^```(?P<language>\w+)\n(?P<code>.*?)^```$", re.M | re.S
)
SHELLS = ("bash", "sh", "shell", "console")
LAUNCHERS = ("accelerate", "torchrun", "python", "python3")
LINK = re.compile(r"\]\((?!\w+:)([^)#\s]*)(#[^)\s]+)?\)")
RECIPE = re.compile(r"recipes/\w+\.py")
MOST_SKIPS = 2

pytestmark = pytest.mark.usefixtures("unchecked")  # as readers run it: 1 passes for 1.0


@dataclass(frozen=True)
class Block:
    language: str
    code: str
    line: int
    skip: str | None = None


def blocks(text: str) -> list[Block]:
    return [
        Block(found["language"], found["code"], text.count("\n", 0, found.start("code")), found["reason"])
        for found in FENCE.finditer(text)
    ]


def of(*languages: str) -> list[object]:
    return [
        pytest.param(block, id=f"line-{block.line}", marks=[pytest.mark.skip(block.skip)] if block.skip else [])
        for block in blocks(README)
        if block.language in languages
    ]


# Python


@pytest.mark.parametrize("block", of("python", "py"))
def test_python_runs(block: Block, tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("teacher", "student"):  # the model folders that blocks open
        (tmp_path / name).symlink_to(tiny_bert)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code = compile("\n" * block.line + block.code, "README.md", "exec")  # so that a traceback names the README's line
    exec(code, {"__name__": "__main__"})


# Commands


@pytest.mark.parametrize("block", of(*SHELLS))
def test_commands_exist(block: Block) -> None:
    for command in commands(block.code):
        check_command(command)


def commands(script: str) -> Iterator[list[str]]:
    """The words of each command: prompts, comments and NAME=value in front left out, split at && ; and |."""
    for line in script.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line.strip().removeprefix("$ "), posix=True, punctuation_chars="&|;")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if set(word) <= set("&|;"):
                yield from [words] if words else []
                words = []
            elif words or not re.match(r"\w+=", word):
                words.append(word)


def check_command(words: Sequence[str]) -> None:
    """ValueError if it names a recipe, module, flag, file or extra that is not there."""
    program, *rest = words
    if program in ("pip", "uv"):
        check_pip(rest)
    elif program == "pytest":
        missing([word for word in rest if word.startswith("tests/")])
    elif program in LAUNCHERS:
        check_launch(rest)
    elif program.startswith((".", "tests/", "recipes/")) or program in ("bash", "sh"):
        missing([program] if program not in ("bash", "sh") else rest[:1])
    elif program not in ("git", "cd", "ruff", "mypy", "source", "export", "jupyter", "tensorboard"):
        raise ValueError(f"{program} is no command that this test can check: {shlex.join(words)}")


def check_pip(rest: Sequence[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for flag, value in pairwise(rest):
        if flag in ("-c", "-r", "--constraint", "--requirement"):
            missing([value])
    for word in rest:
        if found := re.fullmatch(r"(?:\.|distill)\[([\w,]+)\]", word):
            unknown = set(found[1].split(",")) - set(project["optional-dependencies"])
            if unknown:
                raise ValueError(f"pyproject.toml has no extra {', '.join(sorted(unknown))}")


def check_launch(rest: Sequence[str]) -> None:
    """accelerate launch [--flags] recipes/NAME.py [--flags], or python -m distill.NAME [...]."""
    places = [number for number, word in enumerate(rest) if RECIPE.fullmatch(word)]
    if places:
        parse_recipe(rest[places[0]], rest[places[0] + 1 :])
    elif "-m" in rest:
        module, *flags = rest[list(rest).index("-m") + 1 :]
        if module.split(".")[0] == "distill":
            parse_module(module, flags)
    else:
        missing([word for word in rest if word.endswith(".py")])


def parse_recipe(path: str, flags: Sequence[str]) -> object:
    """The recipe as its own command line makes it, without running it; a wrong flag or value is a ValueError."""
    missing([path])
    arguments = [flag for flag in flags if flag not in ("--debug", "--help")]
    shown = io.StringIO()
    try:
        with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
            return cli._parse(runs.recipe_module(Path(path).stem).Recipe, arguments, "")
    except (SystemExit, RecipeError) as error:
        raise ValueError(f"{path} {shlex.join(flags)} is refused: {error} {shown.getvalue()}") from error


def parse_module(name: str, flags: Sequence[str]) -> None:
    """argparse alone: what would happen after it does not."""
    found = importlib.util.find_spec(name)
    if found is None:
        raise ValueError(f"python -m {name}: there is no such module")
    program = f"{name}.__main__" if found.submodule_search_locations else name
    shown = io.StringIO()
    parse = mock.patch("argparse.ArgumentParser.parse_args", autospec=True, side_effect=parsed_only)
    try:
        with parse, contextlib.redirect_stderr(shown):
            importlib.import_module(program).main(list(flags))
    except Parsed:
        return
    except SystemExit as error:
        raise ValueError(f"python -m {name} {shlex.join(flags)} is refused: {shown.getvalue()}") from error
    raise ValueError(f"python -m {name} reads no arguments")


class Parsed(Exception):
    """The arguments were understood; stop here."""


def parsed_only(parser: object, arguments: Sequence[str] | None = None) -> None:
    _, unknown = parser.parse_known_args(arguments)  # type: ignore[attr-defined]
    if unknown:
        parser.error(f"unrecognized arguments: {unknown}")  # type: ignore[attr-defined]
    raise Parsed


def missing(paths: Sequence[str]) -> None:
    gone = [path for path in paths if not (ROOT / path.split("::")[0]).exists()]
    if gone:
        raise ValueError(f"not in the repository: {', '.join(gone)}")


# Text


def test_relative_links_resolve() -> None:
    anchors = {anchor(title) for title in re.findall(r"^#+ (.*)$", README, re.M)}
    for path, section in LINK.findall(README):
        missing([path] if path else [])
        assert path or section.removeprefix("#") in anchors, f"README.md has no section {section}"


def test_the_contents_of_the_results_name_each_section() -> None:
    results = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
    sections = [f"#{anchor(title)}" for title in re.findall(r"^## (.*)$", results, re.M)]
    assert [section for path, section in LINK.findall(results) if not path] == sections


def anchor(title: str) -> str:
    """As GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def test_flags_named_in_the_text_exist() -> None:
    prose = FENCE.sub("", README)
    named = {
        flag for code in re.findall(r"`([^`\n]+)`", prose) for flag in re.findall(r"(?<![\w-])--[a-z][\w.-]*", code)
    }
    known = {"--help", "--debug", "--num_processes", "--num_machines", "--mixed_precision", "--multi_gpu", "--cpu"}
    known |= {flag for path in ROOT.glob("recipes/*.py") for flag in recipe_flags(f"recipes/{path.name}")}
    assert sorted(named - known) == []


@cache
def recipe_flags(path: str) -> set[str]:
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), pytest.raises(SystemExit):
        cli._parse(runs.recipe_module(Path(path).stem).Recipe, ["--help", "all"], "")
    return set(re.findall(r"(?<![\w-])--[a-z][\w.-]*", shown.getvalue()))


def test_files_named_in_the_text_exist() -> None:
    """Modules and recipes; the annotated tree too."""
    missing(RECIPE.findall(README))
    indented = [line for line in README.splitlines() if line.startswith("    ")]
    for line in indented:
        names = re.findall(r"(?<![\w/.*])(\w+\.py)\b", line)
        gone = [name for name in names if not any((ROOT / top).glob(f"**/{name}") for top in ("distill", "recipes"))]
        assert not gone, f"the tree in README.md names {', '.join(gone)}"


def test_skips_are_rare_and_nothing_is_left_to_fill_in() -> None:
    assert sum(block.skip is not None for block in blocks(README)) <= MOST_SKIPS
    assert not re.search(r"^(RESULTS|TODO|TBD|FIXME)$|\bTODO\b", README, re.M)


# The checks themselves


def test_blocks_are_found_with_their_line_and_their_reason() -> None:
    text = "# a\n\n```python\nx = 1\n```\n\n<!-- test: skip needs a GPU -->\n\n```bash\nls\n```\n"
    assert blocks(text) == [Block("python", "x = 1\n", 3), Block("bash", "ls\n", 9, "needs a GPU")]


def test_links_are_found_with_their_sections() -> None:
    text = "[a](recipes/a.py) [b](#where-it-stops) [c](b.md#x) ![d](d.png) [e](https://example.org/f)"
    expected = [("recipes/a.py", ""), ("", "#where-it-stops"), ("b.md", "#x"), ("d.png", "")]
    assert LINK.findall(text) == expected
    assert anchor("The student x teacher matrix: `b`, n") == "the-student-x-teacher-matrix-b-n"


def test_commands_are_split() -> None:
    script = '$ A=1 pip install -e ".[dev]" && pytest -q; ls | wc # done\n\n# only this\npython x.py \\\n  --a "b c"\n'
    expected = [["pip", "install", "-e", ".[dev]"], ["pytest", "-q"], ["ls"], ["wc"], ["python", "x.py", "--a", "b c"]]
    assert list(commands(script)) == expected


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("accelerate launch recipes/no_such.py", "not in the repository: recipes/no_such.py"),
        ("accelerate launch --num_processes 2 recipes/quickstart.py --no-such-flag 3", "no-such-flag"),
        ("python recipes/quickstart.py --texts many", "many"),
        ("python recipes/quickstart.py --texts 3", "16 or more"),
        ("python -m distill.no_such x", "no such module"),
        ("python -m distill.store polish STORE", "polish"),
        ("pip install -c no-such.txt -e .[demo]", "no-such.txt"),
        ("pip install -e .[demo,nothing]", "no extra nothing"),
        ("pytest tests/test_no_such.py", "test_no_such.py"),
        ("frobnicate all", "frobnicate"),
    ],
)
def test_wrong_commands_are_refused(command: str, reason: str) -> None:
    with pytest.raises(ValueError, match=re.escape(reason)):
        check_command(shlex.split(command))


def test_right_commands_pass() -> None:
    for command in (
        "accelerate launch --num_processes 2 recipes/quickstart.py --texts 600 --student layers",
        "python -m distill.store verify STORE",
        "pip install -e .[demo,dev]",
        "pytest -q tests/test_readme.py",
    ):
        check_command(shlex.split(command))
