"""The command that joins the stores of several teachers, of any widths and tokenizers, into one to train on (`joining`).

python -m distill.teachers STORE STORE2 --method procrustes --weights 2 1 --output NEW
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from distill.data import load_texts
from distill.encoder import Encoder
from distill.errors import RecipeError, reported
from distill.joining import Joined, join_stores, keys_by_role
from distill.store import Store


def main(arguments: Sequence[str] | None = None) -> int:
    """python -m distill.teachers STORE STORE2 ... --output NEW"""
    return reported(partial(_print_joined, _parser().parse_args(arguments)))


def _print_joined(options: argparse.Namespace) -> int:
    print(_join(options))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m distill.teachers", description="Join the stores of several teachers into one to train on."
    )
    parser.add_argument(
        "stores", nargs="+", type=Path, help="the first one's prompts, and with procrustes its space, stay"
    )
    parser.add_argument("--method", choices=("procrustes", "concatenate", "gram"), default="procrustes")
    parser.add_argument("--weights", nargs="+", type=float, help="one a store; equal if none are given")
    parser.add_argument("--width", type=int, help="of gram, and of concatenate if it is to be reduced")
    parser.add_argument("--output", type=Path, required=True, help="folder of the new store")
    parser.add_argument("--teachers", nargs="+", help="for teachers whose prompts differ: their names, one a store")
    for name in ("texts", "queries", "documents"):
        parser.add_argument(f"--{name}", nargs="+", help="and the texts: JSONL, CSV, TXT, Parquet; .gz")
    parser.add_argument("--column", help="column of the texts")
    return parser


def _join(options: argparse.Namespace) -> Joined:
    stores = [Store.open(path) for path in options.stores]
    keys = _named_keys(options, stores)
    return join_stores(stores, options.method, options.weights, options.width, keys, options.output)


def _named_keys(options: argparse.Namespace, stores: Sequence[Store]) -> list[np.ndarray] | None:
    """Keys of the texts that were named, by each teacher's prompts; None if none were."""
    files = {"": options.texts, "query": options.queries, "document": options.documents}
    if not options.teachers and not any(files.values()):
        return None
    if not options.teachers or not any(files.values()) or len(options.teachers) != len(stores):
        raise RecipeError("--teachers, one a store, and --texts, --queries or --documents go together.")
    texts = {role: load_texts(tuple(names), column=options.column).texts for role, names in files.items() if names}
    encoders = [Encoder.from_pretrained(name) for name in options.teachers]
    for store, encoder in zip(stores, encoders, strict=True):
        _refuse_another(store, encoder)
    return [keys_by_role(texts, encoder) for encoder in encoders]


def _refuse_another(store: Store, encoder: Encoder) -> None:
    weights = encoder.fingerprint()["weights"]
    if store.fingerprint.get("weights") != weights:
        raise RecipeError(f"{store.path} is not of {encoder.name}; name the teachers in the order of their stores.")


if __name__ == "__main__":
    sys.exit(main())
