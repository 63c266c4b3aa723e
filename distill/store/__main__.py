"""The command line of a store: what is in it, whether it is whole; to mend it, to make it smaller, to hand it on."""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from distill.data import load_texts
from distill.errors import IntegrityError, reported
from distill.store import FLAG_NAMES, Store, compress, shards, verify, write_parquet
from distill.store.shards import forget


def main(arguments: Sequence[str] | None = None) -> int:
    """python -m distill.store info|verify|repair|compress|export: see the package's text."""
    options = _parser().parse_args(arguments)
    commands = {"info": _print_info, "verify": _print_verify, "repair": _repair}
    if options.command == "compress":
        return reported(partial(_compress, options.path, options.new, options.form))
    if options.command == "export":
        return reported(partial(_export, options))
    return reported(partial(commands[options.command], options.path))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m distill.store", description="Inspect, repair, compress or export a store of teacher vectors."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what in {
        "info": "what is in it, and what compression cost",
        "verify": "whether every file is what was written",
        "repair": "take damaged shards out; embed() computes only their rows anew",
        "compress": "write its rows into a new store, in fewer bytes",
        "export": "write its rows into a Parquet file",
    }.items():
        commands.add_parser(name, help=what, description=what).add_argument("path", type=Path)
    smaller = commands.choices["compress"]
    smaller.add_argument("new", type=Path, help="folder of the new store")
    smaller.add_argument("--as", dest="form", default="int8", help="int8, pca-K or pca-K-int8, as pca-256")
    parquet = commands.choices["export"]
    parquet.add_argument("parquet", type=Path, help="the file; it takes the place of one of that name")
    parquet.add_argument(
        "--texts", help="the texts of the rows (JSONL, CSV, TXT, Parquet; .gz): a store keeps only their keys"
    )
    parquet.add_argument("--column", help="column of the texts")
    parquet.add_argument("--prompt", default="", help="what the texts were embedded with in front of them")
    return parser


def _print_verify(path: Path) -> int:
    damaged = verify(path)
    for file, problem in damaged.items():
        print(f"{file}: {problem}")
    for file in Store.open(path).orphans() if not damaged else ():
        print(f"{file}: not in the manifest, which is older, or a killed writer left it; the next embed() deletes it")
    names = [shard.file for shard in shards.read_manifest(path).shards]
    print(f"{path}: {len(names) - len(damaged.keys() & set(names))} of {len(names)} shards are whole")
    return IntegrityError.exit_code if damaged else 0


def _repair(path: Path) -> int:
    shards.read_codec(path, shards.read_manifest(path))  # raises: what it belongs to cannot be mended by shards
    damaged = verify(path)
    forget(path, damaged)
    print(f"{path}: {len(damaged)} damaged shards taken out. Run embed() again: only their rows are computed anew.")
    return 0


def _compress(path: Path, new: Path, form: str) -> int:
    small = compress(path, new, form)
    before, after = (sum(shard.bytes for shard in one.shards) for one in (Store.open(path), small))
    print(f"{new}: {len(small):,} rows as {form}, {before:,} bytes are {after:,}; {small.distortion}")
    return 0


def _export(options: argparse.Namespace) -> int:
    texts = load_texts((options.texts,), column=options.column).texts if options.texts else None
    rows = write_parquet(Store.open(options.path), options.parquet, texts, prompt=options.prompt)
    print(f"{options.parquet}: {rows:,} rows, {options.parquet.stat().st_size:,} bytes")
    return 0


def _print_info(path: Path) -> int:
    store = Store.open(path)
    for name, value in store.fingerprint.items():
        print(f"{name}: {value}")
    flagged = {name: int((store.flags == flag).sum()) for flag, name in FLAG_NAMES.items()}
    print(
        f"rows: {len(store):,} of width {store.width}, {len(store.shards)} shards, {sum(s.bytes for s in store.shards):,} bytes"
    )
    print(f"stored as: {store.codec.format}, {store.row_bytes} bytes a row")
    if store.distortion:
        print(f"lost by that: {store.distortion}")
    print("set aside: " + (", ".join(f"{count} {name}" for name, count in flagged.items() if count) or "none"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
