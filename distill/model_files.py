"""Which files a model folder has to hold, and which it must not."""

import fnmatch
import json
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from distill.errors import ResourceError

# What a model folder needs, and what is never fetched even where a name matches.
WANTED = ["*.safetensors", "*.json", "*.txt", "*.model", "*.md"]
UNWANTED = ["onnx/*", "openvino/*", "*/onnx/*", "*/openvino/*", "*.bin", "*.pt", "*.pth", "*.pkl", "*.py"]
# What tokenizers read their vocabulary from; transformers makes an empty one, without a word, where there is none.
VOCABULARIES = ["tokenizer.json", "tokenizer.*.json", "vocab.txt", "*.model", "*.tiktoken", "*.spm", "tekken.json"]
PICKLED = re.compile(r"(pytorch_model|model)[^/]*\.(bin|pt|pth|ckpt|pkl)$")


def check_folder(folder: Path) -> None:
    """`check_files` of a folder."""
    check_files(sorted(_files(folder)), where=str(folder))


def check_files(files: Sequence[str], *, where: str) -> None:
    """Refuse what is no model folder, and one whose weights would have to be unpickled: a ResourceError."""
    if not {"modules.json", "config.json"} & set(files):
        raise ResourceError(
            f"{where} is no model: it holds neither modules.json nor config.json. "
            "Give a folder that sentence-transformers or transformers has saved, or a Hub name."
        )
    safe = {str(PurePosixPath(file).parent) for file in files if file.endswith(".safetensors")}
    for file in files:
        if PICKLED.fullmatch(PurePosixPath(file).name) and not _matches(file, ["onnx/*", "openvino/*"]):
            if str(PurePosixPath(file).parent) in safe:
                continue
            raise ResourceError(
                f"{where}: the weights are in {file}, a pickle, and reading a pickle can run anything. Convert them where "
                "you trust them: load the model with sentence_transformers.SentenceTransformer(...) and call "
                "save_pretrained(folder), which writes model.safetensors; then give that folder."
            )


def is_wanted(path: str) -> bool:
    """Whether a model folder needs a file, by its path in there."""
    return _matches(path, WANTED) and not _matches(path, UNWANTED)


def missing_files(folder: Path, listed: Sequence[str] | None) -> list[str]:
    """Which of the listed files a folder lacks; without a list, which of those that its own files call for."""
    here = _files(folder)
    return [file for file in listed or _called_for(folder, here) if file not in here]


def has_vocabulary(folder: Path) -> bool:
    """Whether a transformer's folder holds a file that its tokenizer reads its vocabulary from."""
    names = {item.name for item in folder.iterdir()}
    return any(_matches(name, VOCABULARIES) for name in names) or {"vocab.json", "merges.txt"} <= names


def _matches(path: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)


def _files(folder: Path) -> set[str]:
    return {item.relative_to(folder).as_posix() for item in folder.rglob("*") if item.is_file()}


def _called_for(folder: Path, here: set[str]) -> list[str]:
    """The files without which a folder is no whole model, as far as the files that are here tell."""
    of_sentence_transformers = {
        "config_sentence_transformers.json",
        "sentence_bert_config.json",
        "1_Pooling/config.json",
    }
    files = ["modules.json"] if of_sentence_transformers & here else []
    files += [] if {"modules.json", "config.json"} & here else ["config.json"]
    files += [] if any(file.endswith(".safetensors") for file in here) else ["model.safetensors"]
    for file in sorted(here):
        index = PurePosixPath(file)
        if index.name == "model.safetensors.index.json":
            files += [str(index.parent / shard) for shard in _shards(folder / index)]
    return files


def _shards(index: Path) -> list[str]:
    """The files of weights that an index names; none if it cannot be read, which whoever loads them says better."""
    try:
        return sorted(set(map(str, json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())))
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return []
