"""Docstrings as a corpus: what is taken from one, and that the list is the same for all processes."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill import docstrings
from distill.docstrings import DocstringCorpus, DocstringPair, as_pair, docstring_pairs
from distill.errors import DataError

SUMMARY = "Return the nearest neighbours of each row."
BODY = "The rows are compared by cosine, and a row is not its own neighbour."


def pair(docstring: str) -> tuple[str, str] | None:
    found = as_pair(textwrap.dedent(docstring), "package")
    return found and (found.summary, found.description)


# One docstring


def test_summary_and_prose() -> None:
    assert pair(f"{SUMMARY}\n\n{BODY}") == (SUMMARY, BODY)
    assert pair(f"{SUMMARY} {BODY}") == (SUMMARY, BODY)
    assert pair("Return the nearest\nneighbours of each row.\n\n" + BODY) == (SUMMARY, BODY)


@pytest.mark.parametrize(
    "section",
    [
        "Parameters\n----------\nx : int\n    The number of the thing that is to be counted here.",
        "Args:\n    x: The number of the thing that is to be counted here.",
        ":param x: The number of the thing that is to be counted here.",
        ">>> neighbours(rows)\n[1, 2]",
        "Details\n=======\nMore words about the thing that is to be counted here.",
    ],
)
def test_prose_ends_at_the_first_section(section: str) -> None:
    assert pair(f"{SUMMARY}\n\n{BODY}\n\n{section}\n\nAnd some words after the section that are not taken.") == (
        SUMMARY,
        BODY,
    )


@pytest.mark.parametrize(
    "block",
    [".. note::\n    Words.", "    indented = code()", "* one\n* two", "| a | b |", "+---+", "1. first", "```\nx\n```"],
)
def test_blocks_that_are_no_prose_are_left_out(block: str) -> None:
    assert pair(f"{SUMMARY}\n\n{block}\n\n{BODY}") == (SUMMARY, BODY)


def test_markup_is_taken_away() -> None:
    marked = (
        "The :class:`~torch.nn.Module` named ``encoder`` is *moved* to the `device`, see the [manual](http://x.y) and "
        "`the paper <http://x.y>`_ [1]_ on the **subject** of it::"
    )
    plain = "The Module named encoder is moved to the device, see the manual and the paper on the subject of it."
    assert pair(f"{SUMMARY}\n\n{marked}") == (SUMMARY, plain)


@pytest.mark.parametrize(
    "docstring",
    [
        "",
        SUMMARY,
        f"Too short.\n\n{BODY}",
        f"{SUMMARY}\n\nToo short as well.",
        f"f(x, y=[1, 2], *args, **kw) -> dict[str, int]\n\n{BODY}",
        f"{SUMMARY}\n\n0x00 0x01 0x02 0x03 0x04 0x05 0x06 0x07 the 0x08 is 0x09",
        f"{SUMMARY}\n\nИмя файла должно быть указано так как оно записано на диске в этом месте.",
        f"{' '.join(['word'] * 60)}\n\n{BODY}",
    ],
)
def test_what_is_no_pair_of_sentences_is_left_out(docstring: str) -> None:
    assert pair(docstring) is None


def test_a_long_description_is_cut_at_a_sentence() -> None:
    found = pair(
        f"{SUMMARY}\n\n"
        + " ".join(f"The row {'with many words' * 3} is one of the rows that are here." for _ in range(30))
    )
    assert found is not None
    assert 100 < len(found[1].split()) <= 120
    assert found[1].endswith("here.")


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_any_docstring_gives_a_pair_or_none(docstring: str) -> None:
    assert as_pair(docstring, "package") is None or docstring


# Packages


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment of three packages: one with copies, one that does not parse."""
    names = ["rows", "columns", "cells", "tables"]
    body = "".join(
        f'def f{index}():\n    """Return the nearest {word} of each given {word}.\n\n'
        f'    All {word} are compared by cosine, {" ".join([word] * index)} and one is never its own neighbour.\n    """\n'
        for index, word in enumerate(names)
    )
    (tmp_path / "alpha").mkdir()
    (tmp_path / "alpha" / "one.py").write_text(body)
    (tmp_path / "alpha" / "tests").mkdir()
    (tmp_path / "alpha" / "tests" / "test_one.py").write_text(body.replace("nearest", "most distant"))
    (tmp_path / "beta.py").write_text(body.replace("nearest", "closest").replace("compared", "measured"))
    broken = tmp_path / "gamma" / "broken.py"
    broken.parent.mkdir()
    broken.write_text(body + "def f(:\n")
    (tmp_path / "not-a-package").mkdir()
    monkeypatch.setattr(docstrings.sysconfig, "get_paths", lambda: {"purelib": str(tmp_path)})
    return tmp_path


def test_packages_are_read_without_tests_and_counted(packages: Path) -> None:
    corpus = docstring_pairs()
    assert (len(corpus), corpus.packages, corpus.files, corpus.unparsed) == (8, 2, 2, 1)
    assert {found.package for found in corpus.pairs} == {"alpha", "beta"}
    assert str(corpus) == "8 docstrings from 2 packages and 2 files (1 files could not be parsed)"
    assert len(corpus.texts()) == 16


def test_copies_are_dropped(packages: Path) -> None:
    (packages / "delta.py").write_text((packages / "alpha" / "one.py").read_text().replace("Return", "RETURN"))
    assert len(docstring_pairs()) == 8


def test_limit_seed_and_packages(packages: Path) -> None:
    whole = docstring_pairs(seed=1).pairs
    assert docstring_pairs(seed=1, limit=3).pairs == whole[:3]
    assert docstring_pairs(seed=1).pairs == whole
    assert docstring_pairs(seed=2).pairs != whole
    assert {found.package for found in docstring_pairs(packages=["beta"]).pairs} == {"beta"}
    with pytest.raises(DataError, match="Not installed here: omega"):
        docstring_pairs(packages=["omega"])
    with pytest.raises(DataError, match="at least 1"):
        docstring_pairs(limit=0)
    with pytest.raises(DataError, match="No docstring"):
        docstring_pairs(packages=["gamma"])


def test_the_split_is_by_package(packages: Path) -> None:
    train, held_out = docstring_pairs().split(0.5)
    assert {found.package for found in train.pairs}.isdisjoint(found.package for found in held_out.pairs)
    assert (train.packages, held_out.packages, len(train) + len(held_out)) == (1, 1, 8)
    assert docstring_pairs().split(0.5) == (train, held_out)
    with pytest.raises(DataError, match="two packages"):
        train.split(0.5)
    with pytest.raises(DataError, match="between 0 and 1"):
        docstring_pairs().split(1.0)


def test_near_copies_do_not_cross_the_split() -> None:
    words = [f"word{index}" for index in range(40)]
    copied = " ".join(words)
    changed = " ".join([*words[:35], "other", "end"])
    pairs = [DocstringPair(SUMMARY, copied, "a"), DocstringPair("Another summary of it.", changed, "b")]
    pairs += [DocstringPair(f"Own summary {name} of it.", f"{name} " * 20, name) for name in ("a", "b")]
    corpus = DocstringCorpus(pairs=pairs, packages=2, files=2, unparsed=0)
    train, held_out = corpus.split(0.5)
    assert (len(train), len(held_out)) == (1, 2)


def test_retrieval_pairs_each_summary_with_its_description(packages: Path) -> None:
    corpus = docstring_pairs()
    found = corpus.retrieval()
    assert found.queries == [entry.summary for entry in corpus.pairs]
    assert found.corpus == [entry.description for entry in corpus.pairs]
    assert found.qrels["3"] == {"3": 1}


def test_all_processes_agree() -> None:
    program = "from distill.docstrings import docstring_pairs; print(docstring_pairs(limit=40, packages=['json', 'email', 'ast']).pairs)"
    runs = [
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout for _ in "12"
    ]
    assert runs[0] == runs[1]
    assert runs[0].count("DocstringPair") > 10


def test_the_installed_packages_make_a_corpus() -> None:
    corpus = docstring_pairs(limit=500)
    assert len(corpus) == 500
    assert corpus.packages > 20
    train, held_out = corpus.split(0.2)
    assert 60 < len(held_out) < 200
    assert len(train) + len(held_out) > 480
