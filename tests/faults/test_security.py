"""Nothing that is read can run: no way to unpickle or evaluate in the code, and hostile files are refused, each by name."""

import ast
import io
import json
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import counts
import numpy as np
import pytest
import tiny
import torch

from distill.data import load_texts
from distill.embed.taking import main as embed_main
from distill.encoder import Encoder
from distill.errors import DistillError
from distill.store import Store, verify

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted([*(ROOT / "distill").rglob("*.py"), *(ROOT / "recipes").glob("*.py")])
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml"}
CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "torch.load",
    "yaml.load",
    "os.system",
    "os.popen",
    "pickle.load",
    "pickle.loads",
}


def dangers(source: str) -> Iterator[str]:
    """What in a program could run what it reads: "line: what"."""
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
        yield from (
            f"{node.lineno}: import of {name}" for name in names if name in CALLS or name.split(".")[0] in MODULES
        )  # type: ignore[attr-defined]
        if isinstance(node, ast.Call):
            yield from _dangers_of_call(node)


def _dangers_of_call(node: ast.Call) -> Iterator[str]:
    name, options = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
    if name in CALLS:
        yield f"{node.lineno}: {name}"
    if name in ("np.load", "numpy.load") and options.get("allow_pickle") != "False":
        yield f"{node.lineno}: {name} without allow_pickle=False"
    if options.get("shell", "False") != "False":
        yield f"{node.lineno}: {name} with a shell"
    if options.get("trust_remote_code", "False") != "False":
        yield f"{node.lineno}: {name} with trust_remote_code"
    if options.get("weights_only", "True") != "True":
        yield f"{node.lineno}: {name} without weights_only"


@pytest.mark.parametrize("path", SOURCES, ids=[str(path.relative_to(ROOT)) for path in SOURCES])
def test_no_program_can_run_what_it_reads(path: Path) -> None:
    assert list(dangers(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import yaml",
        "def f():\n    import joblib",
        "from torch import load",
        "torch.load(path)",
        "eval(text)",
        "exec(text)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "subprocess.run(line, shell=True)",
        "os.system(line)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "AutoModel.from_pretrained(path, trust_remote_code=trust)",
        "read(path, weights_only=False)",
    ],
)
def test_the_walk_sees(source: str) -> None:
    assert list(dangers(source))


def test_the_walk_lets_pass_what_is_safe() -> None:
    safe = "model.eval()\nre.compile('a')\ntorch.compile(f)\nnp.load(path, allow_pickle=False)\nread(p, trust_remote_code=False)"
    assert list(dangers(safe)) == []


# Hostile files: each builder leaves something hostile in a folder and returns what reads it.

CANARY = "distill-was-run"


class Bomb:
    """Runs when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
        return os.putenv, (CANARY, "1")


def bomb() -> bytes:
    return pickle.dumps(Bomb())


def torch_bomb() -> bytes:
    out = io.BytesIO()
    torch.save({"embedding.weight": Bomb()}, out)
    return out.getvalue()


Read = Callable[[], object]
Hostile = Callable[[Path, Path], Read]


def model_with(change: Callable[[Path], object]) -> Hostile:
    """A sound model's folder, changed."""

    def build(folder: Path, model: Path) -> Read:
        shutil.copytree(model, folder / "model")
        change(folder / "model")
        return lambda: Encoder.from_pretrained(folder / "model").encode(["a b c"])

    return build


def edit_json(name: str, change: Callable[[object], object]) -> Callable[[Path], None]:
    def edit(model: Path) -> None:
        value = json.loads((model / name).read_text())
        (model / name).write_text(json.dumps(change(value) or value))

    return edit


def module_type(kind: str) -> Hostile:
    return model_with(edit_json("modules.json", lambda value: value[1].update(type=kind)))  # type: ignore[index]


def module_path(path: str) -> Hostile:
    return model_with(edit_json("modules.json", lambda value: value[1].update(path=path)))  # type: ignore[index]


def only_pickled(name: str, content: Callable[[], bytes]) -> Hostile:
    def change(model: Path) -> None:
        (model / "model.safetensors").unlink()
        (model / name).write_bytes(content())

    return model_with(change)


def weights(content: Callable[[], bytes]) -> Hostile:
    return model_with(lambda model: (model / "model.safetensors").write_bytes(content()))


def remote_code(model: Path) -> None:
    (model / "evil.py").write_text(
        f"import os\nos.environ[{CANARY!r}] = '1'\nfrom transformers import BertModel, BertConfig\n"
    )
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoModel": "evil.BertModel", "AutoConfig": "evil.BertConfig"}}
    (model / "config.json").write_text(json.dumps(config))


def header(length: int, body: bytes = b"{}") -> bytes:
    return struct.pack("<Q", length) + body


def activation(path: str) -> Hostile:
    def build(folder: Path, model: Path) -> Read:
        made = tiny.bert_cls_dense(folder / "model")
        edit_json("2_Dense/config.json", lambda value: value.update(activation_function=path))(made)  # type: ignore[attr-defined]
        return lambda: Encoder.from_pretrained(made)

    return build


def store_with(change: Callable[[Path, dict], object]) -> Hostile:
    def build(folder: Path, model: Path) -> Read:
        from scenes import build_store

        build_store(folder)
        path = folder / "store"
        manifest = json.loads((path / "manifest.json").read_text())
        change(path, manifest)
        if manifest:
            (path / "manifest.json").write_text(json.dumps(manifest))

        def read() -> None:
            if found := verify(path):  # found by verify, at the least
                Store.open(path)
                raise DistillError(str(found))
            Store.open(path)

        return read

    return build


def shard_file(name: str) -> Hostile:
    return store_with(lambda path, manifest: manifest["shards"][0].update(file=name))


def shard_content(content: Callable[[], bytes]) -> Hostile:
    def change(path: Path, manifest: dict) -> None:
        (path / manifest["shards"][0]["file"]).write_bytes(content())

    return store_with(change)


def shard_link(path: Path, manifest: dict) -> None:
    file = path / manifest["shards"][0]["file"]
    file.unlink()
    file.symlink_to("/etc/passwd")


def checkpoint_with(change: Callable[[Path], object]) -> Hostile:
    def build(folder: Path, model: Path) -> Read:
        from scenes import loaded_step, save_step

        save_step(folder, 2)
        change(folder / "checkpoints" / "step-00000002")
        return lambda: loaded_step(folder)

    return build


def hostile_manifest(step: Path) -> None:
    hashes = json.loads((step / "manifest.json").read_text())
    (step / "manifest.json").write_text(json.dumps(hashes | {"../../outside": "00" * 32}))


def texts_file(name: str, content: Callable[[], bytes]) -> Hostile:
    def build(folder: Path, model: Path) -> Read:
        (folder / name).write_bytes(content())
        return lambda: load_texts(str(folder / name))

    return build


def vectors_file(content: Callable[[], bytes]) -> Hostile:
    def build(folder: Path, model: Path) -> Read:
        (folder / "vectors.npy").write_bytes(content())
        (folder / "texts.txt").write_text("a\nb\n")
        command = [
            folder / "store",
            "--teacher",
            model,
            "--texts",
            folder / "texts.txt",
            "--vectors",
            folder / "vectors.npy",
        ]

        def read() -> None:
            if embed_main([str(word) for word in command]):
                raise DistillError("refused")

        return read

    return build


def object_array() -> bytes:
    out = io.BytesIO()
    np.save(out, np.array([Bomb(), Bomb()], dtype=object), allow_pickle=True)
    return out.getvalue()


def zipped(name: str) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr(name, bomb())
    return out.getvalue()


HOSTILE: dict[str, Hostile] = {
    "model: pickled weights": only_pickled("pytorch_model.bin", torch_bomb),
    "model: a bare pickle": only_pickled("pytorch_model.bin", bomb),
    "model: .pt": only_pickled("model.pt", torch_bomb),
    "model: .ckpt": only_pickled("model.ckpt", torch_bomb),
    "model: .pkl": only_pickled("model.pkl", bomb),
    "model: a pickle named safetensors": weights(bomb),
    "model: a torch file named safetensors": weights(torch_bomb),
    "model: a zip named safetensors": weights(lambda: zipped("../../evil.py")),
    "model: a header that claims 2^60 bytes": weights(lambda: header(1 << 60)),
    "model: a header that claims 99 MB": weights(lambda: header(99_000_000)),
    "model: a header nested deep": weights(lambda: header(100_000, b"[" * 100_000)),
    "model: remote code": model_with(remote_code),
    "model: a module type of another package": module_type("evil.Module"),
    "model: os.system as a module": module_type("os.system"),
    "model: a module type that looks like ours": module_type("sentence_transformers.models.Evil"),
    "model: a module path upwards": module_path("../../outside"),
    "model: an absolute module path": module_path("/etc"),
    "model: os.system as an activation": activation("os.system"),
    "model: builtins.eval as an activation": activation("builtins.eval"),
    "model: torch.load as an activation": activation("torch.load"),
    "model: config.json that is a pickle": model_with(lambda model: (model / "config.json").write_bytes(bomb())),
    "store: a shard's path upwards": shard_file("../outside.safetensors"),
    "store: an absolute shard path": shard_file("/etc/passwd"),
    "store: a shard's name with NUL": shard_file("rows-\0.safetensors"),
    "store: a link in place of a shard": store_with(shard_link),
    "store: a pickle in place of a shard": shard_content(bomb),
    "store: a shard whose header is a bomb": shard_content(lambda: header(1 << 62)),
    "store: a manifest that is a pickle": store_with(
        lambda path, manifest: ((path / "manifest.json").write_bytes(bomb()), manifest.clear())
    ),
    "checkpoint: a pickle named safetensors": checkpoint_with(
        lambda step: (step / "model.safetensors").write_bytes(bomb())
    ),
    "checkpoint: a manifest that points outside": checkpoint_with(hostile_manifest),
    "checkpoint: a state that is a pickle": checkpoint_with(lambda step: (step / "state.json").write_bytes(bomb())),
    "texts: a pickle named .jsonl": texts_file("texts.jsonl", bomb),
    "texts: a pickle named .parquet": texts_file("texts.parquet", bomb),
    "texts: a pickle named .gz": texts_file("texts.txt.gz", bomb),
    "texts: a pickle named .csv": texts_file("texts.csv", bomb),
    "vectors: an array of objects": vectors_file(object_array),
    "vectors: a pickle named .npy": vectors_file(bomb),
    "vectors: a zip of arrays": vectors_file(lambda: zipped("../../evil.npy")),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused(name: str, tmp_path: Path, tiny_bert: Path) -> None:
    read = HOSTILE[name](tmp_path, tiny_bert)
    with pytest.raises(DistillError) as caught:
        read()
    assert str(caught.value)
    assert CANARY not in os.environ
    counts.note(10, "hostile files refused", 1)


def test_there_are_enough_of_them() -> None:
    assert len(HOSTILE) >= 25


def test_remote_code_is_never_asked_for(tiny_bert: Path, tmp_path: Path) -> None:
    """A model that needs its own code is refused, whatever transformers would do; there is no flag that lets it run."""
    shutil.copytree(tiny_bert, tmp_path / "model")
    remote_code(tmp_path / "model")
    with pytest.raises(DistillError):
        Encoder.from_pretrained(tmp_path / "model")
    assert CANARY not in os.environ
    assert not [path.name for path in (ROOT / "recipes").glob("*.py") if "trust_remote_code" in path.read_text()]
