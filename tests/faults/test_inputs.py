"""Whatever people give: recipes, texts and manifests that are wrong in every way end in a documented error that says where."""

import dataclasses
import importlib.util
import itertools
import json
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import counts
import pytest
import runs
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from scenes import build_store

from distill import cli
from distill.data import load_texts
from distill.errors import DataError, DistillError, IntegrityError, RecipeError
from distill.store import Store, text_keys, verify
from distill.training import TrainConfig

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted(path for path in (ROOT / "recipes").glob("*.py") if not path.name.startswith("_"))


def many(examples: int, full: bool) -> settings:
    """The sample is the same in every run; the sweep draws anew."""
    phases = (Phase.explicit, Phase.generate, Phase.shrink)
    return settings(
        max_examples=max(1, examples),
        deadline=None,
        database=None,
        derandomize=not full,
        phases=phases,
        suppress_health_check=list(HealthCheck),
    )


def refusal(call: Callable[[], object], *kinds: type[BaseException]) -> str | None:
    """The message of the documented error that a call ends with; None if it ends well. Any other error comes through."""
    try:
        call()
    except kinds as error:
        return str(error)
    return None


def recipe_of(path: Path) -> type:
    name = f"recipe_{path.stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name].Recipe


# Recipes

NUMBERS = [0, 1, -1, 2, 7, 10**9, -(10**18), 2**63, 2**64]
FRACTIONS = [0.0, -0.0, 0.5, 1.0, -1.0, 1e-300, 1e300, float("inf"), float("-inf"), float("nan")]
WORDS = [
    "",
    " ",
    "x",
    "int8",
    "auto",
    "pca-0",
    "pca-9",
    "pca-99999999",
    "é",
    "../..",
    "-1",
    "None",
    "a" * 300,
    "\0",
    "\ud800",
]


def values(kind: Any) -> st.SearchStrategy[Any]:
    """Anything that a flag of this type may be, tuples by their items."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return st.one_of([values(one) for one in inner])
    if origin is typing.Literal:
        return st.sampled_from(inner)
    if origin is tuple and ... not in inner:
        return st.tuples(*map(values, inner))
    if origin is tuple:
        return st.lists(values(inner[0]), max_size=4).map(tuple)
    if origin is not None:
        return st.just({})
    if kind is bool:
        return st.booleans()
    if kind is int:
        return st.sampled_from(NUMBERS) | st.integers()
    if kind is float:
        return st.sampled_from(FRACTIONS) | st.floats()
    if kind is str:
        return st.sampled_from(WORDS) | st.text(max_size=8)
    return st.sampled_from(WORDS).map(Path) if kind is Path else st.none()


def groups() -> list[type]:
    """Every group of flags, and every recipe."""
    kinds = [recipe_of(path) for path in RECIPES]
    for kind in list(kinds):
        kinds += [one for one in typing.get_type_hints(kind).values() if dataclasses.is_dataclass(one)]
    return list(dict.fromkeys(kinds))


def required(kind: type) -> list[str]:
    return [
        field.name
        for field in dataclasses.fields(kind)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]


@pytest.mark.usefixtures("unchecked")
def test_settings_that_cannot_be_are_refused(full: bool) -> None:
    kinds, seen = groups(), {"refused": 0, "accepted": 0}

    @many(counts.amount("recipes", full) * 9 // 10, full)
    @given(st.data())
    def mutate(data: st.DataObject) -> None:
        kind = data.draw(st.sampled_from(kinds))
        hints = typing.get_type_hints(kind)
        plain = [name for name, hint in hints.items() if not dataclasses.is_dataclass(hint)]
        chosen = {*required(kind), *data.draw(st.lists(st.sampled_from(plain), min_size=1, max_size=3))}
        given_ = {name: data.draw(values(hints[name])) for name in sorted(chosen)}
        message = refusal(lambda: kind(**given_), RecipeError)
        seen["accepted" if message is None else "refused"] += 1
        assert message is None or message.strip()

    mutate()
    assert min(seen.values()) > sum(seen.values()) / 50
    counts.note(7, "recipes: values of flags", sum(seen.values()))


def flags(kind: type, prefix: str = "--") -> Iterator[str]:
    for name, hint in typing.get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint):
            yield from flags(typing.cast(type, hint), f"{prefix}{name.replace('_', '-')}.")
        else:
            yield prefix + name.replace("_", "-")


def test_command_lines_that_cannot_be_are_refused(full: bool, capsys: pytest.CaptureFixture) -> None:
    kinds, done = [recipe_of(path) for path in RECIPES], itertools.count()
    names = {kind: list(flags(kind)) for kind in kinds}
    word = st.sampled_from([str(one) for one in (*NUMBERS, *FRACTIONS, *WORDS)]) | st.text(max_size=6)

    @many(counts.amount("recipes", full) // 10, full)
    @given(st.data())
    def mutate(data: st.DataObject) -> None:
        kind = data.draw(st.sampled_from(kinds))
        flag = st.sampled_from(names[kind]) | st.sampled_from(["--nothing", "--train", "--help.x", "-x", "--"])
        pairs = data.draw(st.lists(st.tuples(flag, st.lists(word, max_size=2)), max_size=4))
        arguments = [one for name, given_ in pairs for one in (name, *given_)]
        message = refusal(lambda: cli._parse(kind, arguments, "A recipe."), RecipeError, SystemExit)
        assert message is None or message.strip()
        next(done)

    mutate()
    capsys.readouterr()
    counts.note(7, "recipes: command lines", next(done))


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"recipe": 3}', '{"recipe": {"train": 7}}', "\x00", "[" * 100_000]
)
def test_a_damaged_recipe_json_is_named(tmp_path: Path, content: str) -> None:
    """What a run was begun with, when it is resumed."""
    kind = recipe_of(ROOT / "recipes" / "match_embeddings.py")
    recipe = kind(data=("a.txt",), output=tmp_path, train=TrainConfig(resume=True))
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    (tmp_path / "recipe.json").write_text(content)
    with pytest.raises(IntegrityError, match=r"recipe\.json|another recipe"):
        cli.record(recipe, tmp_path)


# Texts

SOUND = st.text(st.characters(codec="utf-8", exclude_characters="\0\r\n"), max_size=12)
PIECES = [
    b'{"text": "fine %d"}',
    b'{"text": null}',
    b'{"text": NaN}',
    b'{"text": 1e999}',
    b'{"text": "\\ud800"}',
    b'{"text": "\\u0000"}',
    b'{"text": "\xff"}',
    b'{"text": ""}',
    b'{"text": "   "}',
    b'{"text": ["a"]}',
    b'{"text": "a", "text": "b"}',
    b'{"txet": "a"}',
    b'{"text": "a"',
    b"[1]",
    b"\xef\xbb\xbf",
    b"\x00",
    b"\xff\xfea\x00",
    b"plain %d",
    b'"quoted, ""twice""",1',
    b'"never closed',
    b"a,b,c",
    b"text,n",
    b"text",
    b"\t\t",
    b"",
    b"\r",
    b"[" * 3000,
    b"9" * 5000,
    "é\u2028\u200b\U0001f600".encode(),
]
SAYS_WHERE = r"line [\d,]+|row [\d,]+|is empty|no text to use|no column|several columns"
ENDINGS = ["a.txt", "a.csv", "a.tsv", "a.jsonl"]


@pytest.fixture(scope="module")
def teacher(tiny_bert: Path) -> Any:
    return runs.teacher(tiny_bert)


def test_hostile_corpora_give_texts_or_name_the_row(full: bool, teacher: Any, tmp_path: Path) -> None:
    seen = {"refused": 0, "read": 0}
    piece = st.sampled_from(PIECES) | SOUND.map(str.encode) | st.binary(max_size=12)

    @many(counts.amount("corpora", full), full)
    @given(st.sampled_from(ENDINGS), st.lists(piece, max_size=8), st.sampled_from([b"\n", b"\r\n"]), st.booleans())
    def corpus(name: str, lines: list[bytes], end: bytes, ended: bool) -> None:
        numbered = [line % number if b"%d" in line else line for number, line in enumerate(lines)]
        (tmp_path / name).write_bytes(end.join(numbered) + (end if ended else b""))
        message = refusal(lambda: load_texts(tmp_path / name), DataError)
        if message is not None:
            seen["refused"] += 1
            assert str(tmp_path / name) in message
            assert re.search(SAYS_WHERE, message), message
            return
        texts = load_texts(tmp_path / name).texts
        seen["read"] += 1
        assert texts
        assert all(text.strip() and text.encode() and "\0" not in text for text in texts)
        assert len(text_keys(texts)) == len(set(texts)) == len(texts)
        tokenized = teacher.tokenize(texts)
        assert int(tokenized.tokens.lengths.max()) <= teacher.max_length

    corpus()
    assert min(seen.values()) > sum(seen.values()) / 50
    counts.note(7, "hostile corpora", sum(seen.values()))


# Manifests

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["float16", "int8", 1, 2]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every container of a JSON value with every key in it."""
    found = []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += [(value, key), *places(inner)]
    return found


def test_mutated_manifests_are_refused_or_read(full: bool, tmp_path: Path) -> None:
    build_store(tmp_path)
    path, seen = tmp_path / "store" / "manifest.json", {"refused": 0, "read": 0}
    original = path.read_text()

    def read() -> None:
        store = Store.open(path.parent)
        if (store.find(text_keys(["old 1"])) >= 0).all():
            store.vectors(["old 1"])

    @many(counts.amount("manifests", full), full)
    @given(st.data())
    def mutate(data: st.DataObject) -> None:
        manifest = json.loads(original)
        for _ in range(data.draw(st.integers(1, 2))):
            holder, key = data.draw(st.sampled_from(places(manifest) or [([], 0)]))
            if not holder:
                continue
            if isinstance(holder, dict) and data.draw(st.booleans()):
                del holder[key]
            else:
                holder[key] = data.draw(JSON)
        raw = json.dumps(manifest)
        if data.draw(st.integers(0, 9)) == 0:
            raw = raw[: data.draw(st.integers(0, len(raw)))]
        path.write_text(raw)
        for look in (read, lambda: verify(path.parent)):
            message = refusal(look, DistillError)
            seen["read" if message is None else "refused"] += 1
            assert message is None or str(path.parent) in message

    mutate()
    assert seen["refused"] > sum(seen.values()) / 4
    counts.note(7, "manifests of stores", sum(seen.values()))
