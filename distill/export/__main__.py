"""The command line of a student's folder: ONNX files, shorter vectors, a repository on the Hub."""

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from torch import nn

from distill import files
from distill.data import load_texts
from distill.docstrings import docstring_pairs
from distill.encoder import Encoder
from distill.errors import RecipeError, reported
from distill.export import onnx
from distill.export.card import with_section
from distill.export.upload import Upload, push
from distill.folder import SETTINGS
from distill.modules import Truncate

TEXTS = 500  # that an ONNX file is measured on


def main(arguments: Sequence[str] | None = None) -> int:
    """python -m distill.export FOLDER [--truncate-dim N] [--onnx [--int8]] [--push-to-hub ORG/NAME]"""
    return reported(partial(_hand_on, _parser().parse_args(arguments)))


def _hand_on(options: argparse.Namespace) -> int:
    _check(options)
    if options.onnx or options.truncate_dim is not None:
        _change(options)
    if options.push_to_hub:
        _upload(options)
    return 0


def _change(options: argparse.Namespace) -> None:
    """Texts and export first: if they fail, the settings and the card are as they were."""
    folder, width = options.folder, options.truncate_dim
    texts = _texts(options.texts) if options.onnx else []
    student = Encoder.from_pretrained(folder)
    if width is not None:
        _truncate(student, folder, width, with_onnx=options.onnx)
    measured = onnx.export_onnx(student, folder, texts, int8=options.int8) if options.onnx else []
    if width is not None:
        _write_width(student, folder)
    if options.onnx:
        _describe_onnx(student, folder, options.texts, measured)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m distill.export",
        description="Hand a student on: its folder is changed in place, or sent to the Hub.",
    )
    parser.add_argument("folder", type=Path, help="folder of the student, as a recipe wrote it")
    parser.add_argument(
        "--truncate-dim",
        type=int,
        help="numbers a vector is cut to by all who open the folder; the full width: whole again",
    )
    parser.add_argument(
        "--onnx", action="store_true", help=f"write {onnx.FOLDER}/{onnx.FLOAT}, and measure it (extra: onnx)"
    )
    parser.add_argument("--int8", action="store_true", help=f"with --onnx: write {onnx.FOLDER}/{onnx.INT8}, too")
    parser.add_argument(
        "--texts", nargs="+", default=(), help="files of texts to measure on; none given: docstrings of this machine"
    )
    parser.add_argument("--push-to-hub", metavar="ORG/NAME", help="send the folder to this repository on the Hub")
    parser.add_argument("--revision", default="main", help="branch to send it to (main)")
    parser.add_argument(
        "--public", action="store_true", help="make a new repository public; private if this is left out"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="only say what --push-to-hub would send; no network is touched"
    )
    return parser


def _check(options: argparse.Namespace) -> None:
    if not (options.onnx or options.push_to_hub or options.truncate_dim is not None):
        raise RecipeError("nothing to do: give --onnx, --truncate-dim or --push-to-hub.")
    if (options.int8 or options.texts) and not options.onnx:
        raise RecipeError("--int8 and --texts belong to --onnx; give it, too.")
    if (options.public or options.dry_run or options.revision != "main") and not options.push_to_hub:
        raise RecipeError("--public, --revision and --dry-run belong to --push-to-hub; give it, too.")
    if not (options.folder / "modules.json").exists():
        raise RecipeError(
            f"{options.folder} is no student: it holds no modules.json. Give the folder that a recipe wrote."
        )
    if options.onnx:
        onnx.require_extra()


def _texts(named: Sequence[str]) -> list[str]:
    return load_texts(tuple(named), limit=TEXTS).texts if named else docstring_pairs(limit=TEXTS // 2).texts()[:TEXTS]


def _truncate(student: Encoder, folder: Path, width: int, *, with_onnx: bool) -> None:
    """The student in memory; the folder stays."""
    full = student.full_width
    if not 1 <= width <= full:
        raise RecipeError(f"--truncate-dim is 1..{full} for {folder}, got {width}.")
    if not with_onnx and (folder / onnx.FOLDER).exists():
        raise RecipeError(f"the files in {folder / onnx.FOLDER} give vectors of the width there is now; add --onnx.")
    whole = [layer for layer in student.head if not isinstance(layer, Truncate)]
    student.head = nn.Sequential(*whole, *([Truncate(width)] if width < full else []))


def _write_width(student: Encoder, folder: Path) -> None:
    path, width, full = folder / SETTINGS, student.width, student.full_width
    settings = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    files.write_json(path, settings | {"truncate_dim": width if width < full else None})
    text = f"Vectors are the first {width} of {full} numbers, not brought to length 1 again: compare them by cosine."
    _note(folder, "Width", text if width < full else f"Vectors are whole: {full} numbers.")
    print(f"{folder}: vectors of {width} numbers")


def _describe_onnx(student: Encoder, folder: Path, texts: Sequence[str], measured: Sequence[onnx.Measured]) -> None:
    prompts = {role: prompt for role, prompt in student.prompts.items() if prompt}
    said = json.dumps(prompts, ensure_ascii=False)
    before = f"Put the prompt of its role before a text: {said}.\n\n" if prompts else ""
    source = ", ".join(texts) or "docstrings of the packages on the machine that wrote the files"
    lines = "\n".join(f"- `{onnx.FOLDER}/{one.file}`{str(one).removeprefix(one.file)}" for one in measured)
    body = (
        "Each file gives the vector itself, pooling and what follows included; batch and length are free.\n\n"
        f"```python\n{onnx.usage()}\n```\n\n{before}Measured beside the PyTorch student, on {source}:\n\n{lines}"
    )
    _note(folder, "ONNX", body)
    print("\n".join(f"{folder / onnx.FOLDER}/{one}" for one in measured))


def _note(folder: Path, title: str, body: str) -> None:
    """A section of the model card, made or replaced."""
    path = folder / "README.md"
    card = path.read_text(encoding="utf-8") if path.exists() else f"# {folder.name}\n"
    with files.published_file(path) as temporary:
        temporary.write_text(with_section(card, title, body), encoding="utf-8")


def _upload(options: argparse.Namespace) -> None:
    upload = Upload(folder=options.folder, repo=options.push_to_hub, revision=options.revision, public=options.public)
    print(upload)
    print("Nothing was sent." if options.dry_run else push(upload))


if __name__ == "__main__":
    sys.exit(main())
