"""A text corpus that every machine has: the docstrings of the Python packages installed on it.

Each pair is a summary line and the prose that follows it: a query and its document, written by people. Packages are read
with `ast` and never imported. The list depends on what is installed and on the seed alone, so that all processes agree.
"""

import ast
import os
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path

from distill import distributed
from distill.data import Retrieval
from distill.errors import DataError

SUMMARY_WORDS = range(4, 41)
DESCRIPTION_WORDS = range(8, 121)
PAIRS_PER_PACKAGE = 250
BYTES_PER_PACKAGE = 600_000  # of source parsed at most: ast reads about 4 MB/s, and some packages hold 50 MB
LARGEST_FILE = 300_000  # bytes; larger ones are tables and generated code
# A docstring with prose after its summary. Files with fewer than one in 8,000 bytes are not worth the parsing.
DESCRIBED = re.compile(rb'"""\s*[^"\n]{15,}\n\s*\n\s*[A-Z`][^"\n]{20,}')
BYTES_PER_DESCRIPTION = 8_000
SHINGLE = 8  # words
SKIPPED = {
    "__pycache__",
    "test",
    "tests",
    "testing",
    "_vendor",
    "vendor",
    "_vendored",
    "vendored",
    "extern",
    "externals",
}
SKIPPED |= {"third_party", "site-packages", "dist-packages", "idlelib", "lib2to3", "turtledemo", "ensurepip"}
SECTION = re.compile(
    r"(parameters?|params|args|arguments|keyword arg\w*|returns?|yields?|receives|raises|warns|warnings?|examples?|notes?|"
    r"references|see also|attributes|methods|usage|inputs?|outputs?|shapes?|todo|options|functions|classes|exports|"
    r"copyright|license|author)(\b[^.]{0,24}:)?$|:\w+[^:]*:|@\w+|>>>",
    re.IGNORECASE,
)
NO_PROSE = re.compile(r"\s|\.\. |[*+#|=~-]|\d+[.)]|\$|```|!\[|<")
MARKUP = [
    (re.compile(r":[\w:.+-]+:`~?(?:[^`<]*[.])?([^`<.]+)(?:\s*<[^`]*>)?`"), r"\1"),  # :class:`~torch.nn.Module`
    (re.compile(r"`([^`<]+?)\s*<[^`>]*>`_{1,2}"), r"\1"),  # `text <url>`_
    (re.compile(r"!?\[([^\]]+)\]\([^)]*\)"), r"\1"),  # [text](url)
    (re.compile(r"\s*\[[\w#*]+\]_"), ""),  # [1]_
    (re.compile(r"`+([^`]*)`+_?"), r"\1"),
    (re.compile(r"(?<!\w)\*{1,2}([^*\s][^*]*)\*{1,2}(?!\w)"), r"\1"),
    (re.compile(r"::?$"), "."),
]
SENTENCE = re.compile(r"(?<=[.!?])(?<!e\.g\.)(?<!i\.e\.)(?<!etc\.)(?<!vs\.)(?<!cf\.)\s+(?=[A-Z\"'(])")
NO_LETTERS = re.compile(r"[^A-Za-z]+")
FUNCTION_WORDS = frozenset(
    ["the", "a", "an", "of", "to", "is", "in", "and", "for", "be", "this", "that", "with", "if", "are"]
)


@dataclass(frozen=True)
class DocstringPair:
    summary: str
    description: str
    package: str


@dataclass(frozen=True, kw_only=True)
class DocstringCorpus:
    """Pairs of summary and description, and what they were read from."""

    pairs: list[DocstringPair]
    packages: int
    files: int
    unparsed: int

    def __len__(self) -> int:
        return len(self.pairs)

    def __str__(self) -> str:
        return (
            f"{len(self.pairs):,} docstrings from {self.packages:,} packages and {self.files:,} files "
            f"({self.unparsed:,} files could not be parsed)"
        )

    def texts(self) -> list[str]:
        """Summaries and descriptions, each a text of its own, once."""
        return list(dict.fromkeys(text for pair in self.pairs for text in (pair.summary, pair.description)))

    def retrieval(self) -> Retrieval:
        """Each summary as a query whose one relevant document is its own description."""
        ids = [str(index) for index in range(len(self.pairs))]
        return Retrieval(
            corpus_ids=ids,
            corpus=[pair.description for pair in self.pairs],
            query_ids=ids,
            queries=[pair.summary for pair in self.pairs],
            qrels={index: {index: 1} for index in ids},
        )

    def split(self, held_out_fraction: float = 0.1, *, seed: int = 0) -> "tuple[DocstringCorpus, DocstringCorpus]":
        """Training and held-out pairs from different packages, in about this share.

        A training pair that has half of its word sequences in common with the held-out side is dropped: packages copy
        each other's code. Needs two packages at least.
        """
        if not 0 < held_out_fraction < 1:
            raise DataError(f"held_out_fraction lies between 0 and 1, got {held_out_fraction}.")
        names = sorted({pair.package for pair in self.pairs}, key=lambda name: _order(seed, name))
        if len(names) < 2:
            raise DataError(f"A split by package needs two packages or more, this corpus holds {len(names)}.")
        counts = {name: sum(pair.package == name for pair in self.pairs) for name in names}
        chosen: set[str] = set()
        for name in names[:-1]:
            if sum(counts[held] for held in chosen) >= held_out_fraction * len(self.pairs):
                break
            chosen.add(name)
        held_out = [pair for pair in self.pairs if pair.package in chosen]
        seen = {shingle for pair in held_out for shingle in _shingles(pair)}
        train = [pair for pair in self.pairs if pair.package not in chosen and not _is_copy(pair, seen)]
        return self._of(train), self._of(held_out)

    def _of(self, pairs: list[DocstringPair]) -> "DocstringCorpus":
        return replace(self, pairs=pairs, packages=len({pair.package for pair in pairs}))


def docstring_pairs(
    *, limit: int | None = None, seed: int = 0, packages: Sequence[str] | None = None
) -> DocstringCorpus:
    """Pairs from the standard library and the installed packages, `packages` alone if given; `limit` picks so many.

    No package gives more than 250 pairs. Takes seconds for a large environment: files are read in an order drawn from
    `seed`, until a package has given its share.
    """
    from tqdm.auto import tqdm

    if limit is not None and limit < 1:
        raise DataError(f"limit is the number of pairs, at least 1; got {limit}. None keeps all.")
    found = _installed_packages()
    if packages is not None and (missing := sorted(set(packages) - set(found))):
        raise DataError(f"Not installed here: {', '.join(missing)}. Top-level import names are expected.")
    names = sorted(found if packages is None else set(packages))
    share = PAIRS_PER_PACKAGE if limit is None else min(PAIRS_PER_PACKAGE, max(10, 6 * limit // len(names)))
    if packages is not None:
        share = max(share, limit or 0)
    pairs: list[DocstringPair] = []
    files = unparsed = 0
    for name in tqdm(
        names, desc="docstrings", unit=" packages", delay=2, disable=distributed.hides_bars(), leave=False
    ):
        reading = _Package(name, found[name], seed, share)
        pairs += reading.pairs
        files, unparsed = files + reading.files, unparsed + reading.unparsed
    pairs = sorted(_distinct(pairs, set()), key=lambda pair: _order(seed, pair.package, pair.summary))[:limit]
    if not pairs:
        raise DataError("No docstring with a summary and a description was found in the installed packages.")
    return DocstringCorpus(pairs=pairs, packages=len({pair.package for pair in pairs}), files=files, unparsed=unparsed)


# Files


def _installed_packages() -> dict[str, list[Path]]:
    """Top-level import names and where they lie: a folder, or one file."""
    roots = {key: Path(path) for key, path in sysconfig.get_paths().items() if key in ("stdlib", "purelib", "platlib")}
    found: dict[str, list[Path]] = {}
    for root in dict.fromkeys(roots.values()):
        for path in sorted(root.iterdir()) if root.is_dir() else []:
            name = path.name.removesuffix(".py")
            known = path.suffix == ".py" or (path.is_dir() and path.suffix == "")
            if known and name.isidentifier() and name not in SKIPPED and path not in found.get(name, []):
                found.setdefault(name, []).append(path)
    return found


def _sources(root: str) -> Iterator[str]:
    """The .py files at or below a path, tests and vendored copies left out."""
    if not os.path.isdir(root):
        yield root
        return
    with os.scandir(root) as items:
        for item in items:
            if item.name.endswith(".py") and not item.name.startswith(("test_", "conftest")):
                yield item.path
            elif item.name not in SKIPPED and item.is_dir(follow_symlinks=False):
                yield from _sources(item.path)


class _Package:
    """The pairs of one package, as many as its share, from files in a seeded order."""

    def __init__(self, name: str, roots: Sequence[Path], seed: int, share: int) -> None:
        self.pairs: list[DocstringPair] = []
        self.files = self.unparsed = self._bytes = 0
        self._seen: set[tuple[str, ...]] = set()
        # The place of a file in its package decides its turn, wherever the package is installed.
        files = [(path[len(str(root.parent)) :], path) for root in roots for path in _sources(str(root))]
        for _, path in sorted(files, key=lambda item: _order(seed, item[0])):
            if len(self.pairs) >= share or self._bytes >= BYTES_PER_PACKAGE:
                break
            self._read(path, name)
        self.pairs = self.pairs[:share]

    def _read(self, path: str, name: str) -> None:
        try:
            with open(path, "rb") as file:
                source = file.read(LARGEST_FILE + 1)
            if not 0 < len(source) <= min(LARGEST_FILE, len(DESCRIBED.findall(source)) * BYTES_PER_DESCRIPTION):
                return
            self._bytes += len(source)
            with warnings.catch_warnings(action="ignore"):  # of their invalid escape sequences
                tree = ast.parse(source)
        except (SyntaxError, ValueError, RecursionError, MemoryError, OSError):
            self.unparsed += 1
            return
        self.files += 1
        pairs = (as_pair(text, name) for text in _docstrings(tree))
        self.pairs += _distinct((pair for pair in pairs if pair), self._seen)


def _docstrings(node: ast.AST) -> Iterator[str]:
    """Of a module, its classes and functions and their methods; what lies inside functions is not entered."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        if text := ast.get_docstring(node):
            yield text
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for child in node.body:
                yield from _docstrings(child)


# Prose


def as_pair(docstring: str, package: str) -> DocstringPair | None:
    """The summary sentence and the prose up to the first section of a cleaned docstring, if both read as English."""
    paragraphs = list(_prose(docstring))
    if not paragraphs:
        return None
    summary, *rest = SENTENCE.split(paragraphs[0])
    description: list[str] = []
    words = 0
    for sentence in [*rest, *(sentence for paragraph in paragraphs[1:] for sentence in SENTENCE.split(paragraph))]:
        words += len(sentence.split())
        if words >= DESCRIPTION_WORDS.stop:
            break
        description.append(sentence)
    body = " ".join(description)
    lengths = len(summary.split()) in SUMMARY_WORDS and len(body.split()) in DESCRIPTION_WORDS
    if not lengths or not _is_letters(summary) or not _is_english(body):
        return None
    return DocstringPair(summary=summary, description=body, package=package)


def _prose(docstring: str) -> Iterator[str]:
    """Paragraphs without markup, up to the first section; lists, tables, code and directives are left out."""
    for paragraph in re.split(r"\n\s*\n", docstring.strip()):
        lines = paragraph.split("\n")
        if SECTION.match(lines[0].strip()) or (len(lines) > 1 and re.fullmatch(r"\s*([-=~^*#])\1{2,}\s*", lines[1])):
            return
        if NO_PROSE.match(lines[0]):
            continue
        text = " ".join(" ".join(lines).split())
        for pattern, plain in MARKUP:
            text = pattern.sub(plain, text)
        if text := text.strip():
            yield text


def _is_letters(text: str) -> bool:
    """At least 85 of 100 characters that are no blanks are ASCII letters: prose has about 96, signatures and tables fewer."""
    visible = text.replace(" ", "")
    return len(NO_LETTERS.sub("", visible)) >= 0.85 * len(visible)


def _is_english(text: str) -> bool:
    return _is_letters(text) and len(FUNCTION_WORDS & set(text.lower().split())) >= 2


# Order and copies


def _order(seed: int, *words: str) -> bytes:
    """A random but repeatable place in a list; Python's own hash differs between processes."""
    return blake2b("\0".join([str(seed), *words]).encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def _distinct(pairs: Iterable[DocstringPair], seen: set[tuple[str, ...]]) -> Iterator[DocstringPair]:
    """Without those whose summary, or whose first ten words of description, were `seen` before."""
    for pair in pairs:
        keys = {("summary", *_words(pair.summary)), ("description", *_words(pair.description)[:10])}
        if not keys & seen:
            yield pair
        seen |= keys


def _shingles(pair: DocstringPair) -> set[int]:
    words = _words(f"{pair.summary} {pair.description}")
    return {hash(tuple(words[start : start + SHINGLE])) for start in range(max(1, len(words) - SHINGLE + 1))}


def _is_copy(pair: DocstringPair, seen: set[int]) -> bool:
    own = _shingles(pair)
    return 2 * len(own & seen) >= len(own)
