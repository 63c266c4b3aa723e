"""The sentence-transformers folder: modules.json, one sub-folder a module, safetensors and JSON only.

Module types are written as `sentence_transformers.models.NAME`, the path that 5.4 and 6.x both open without remote code.
"""

import importlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from distill import files
from distill.errors import IntegrityError, RecipeError
from distill.modules import Dense, Normalize, Pooling, StaticTable, TransformerBackbone

UNLIMITED = 10**9  # max_length of a static table: it has no positions to run out of
_LEGACY_POOLING = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


@dataclass(kw_only=True)
class Parts:
    """What a model folder holds; the arguments of an Encoder."""

    backbone: TransformerBackbone | StaticTable
    tokenizer: Any
    head: list[nn.Module] = field(default_factory=list)
    max_length: int = UNLIMITED
    prompts: dict[str, str] = field(default_factory=dict)
    default_prompt_name: str | None = None
    lowercase: bool = False


def write(parts: Parts, folder: Path) -> None:
    """Write the files of an encoder into an existing, empty folder."""
    static = isinstance(parts.backbone, StaticTable)
    names = ["StaticEmbedding"] if static else ["Transformer", "Pooling"]
    names += [type(layer).__name__ for layer in parts.head]
    modules = [
        {"idx": i, "name": str(i), "path": f"{i}_{name}" if i else "", "type": f"sentence_transformers.models.{name}"}
        for i, name in enumerate(names)
    ]
    for module in modules[1:]:
        (folder / str(module["path"])).mkdir()
    (_write_static if static else _write_transformer)(parts, folder)
    for module, layer in zip(modules[len(modules) - len(parts.head) :], parts.head, strict=True):
        if isinstance(layer, Dense):
            _write_dense(layer, folder / str(module["path"]))
        else:
            files.write_json(folder / str(module["path"]) / "config.json", {})
    files.write_json(folder / "modules.json", modules)
    prompts = {"query": "", "document": ""} | parts.prompts
    files.write_json(
        folder / "config_sentence_transformers.json",
        {
            "model_type": "SentenceTransformer",
            "prompts": prompts,
            "default_prompt_name": parts.default_prompt_name,
            "similarity_fn_name": "cosine",
            "truncate_dim": None,
        },
    )


def _write_static(parts: Parts, folder: Path) -> None:
    save_file({"embedding.weight": parts.backbone.folded().contiguous().cpu()}, folder / "model.safetensors")
    tokenizer = Tokenizer.from_str(parts.tokenizer.to_str())
    tokenizer.no_padding()
    if parts.max_length < UNLIMITED:
        tokenizer.enable_truncation(parts.max_length)
    tokenizer.save(str(folder / "tokenizer.json"))


def _write_transformer(parts: Parts, folder: Path) -> None:
    with _quiet_transformers():
        parts.backbone.model.save_pretrained(folder)
    parts.tokenizer.save_pretrained(folder)
    files.write_json(
        folder / "sentence_bert_config.json", {"max_seq_length": parts.max_length, "do_lower_case": parts.lowercase}
    )
    pooling = parts.backbone.pooling
    modes = {key: mode in pooling.modes for key, mode in _LEGACY_POOLING.items()}
    files.write_json(
        folder / "1_Pooling" / "config.json",
        {"word_embedding_dimension": pooling.hidden} | modes | {"include_prompt": True},
    )


def _write_dense(layer: Dense, folder: Path) -> None:
    activation = type(layer.activation)
    config = {
        "in_features": layer.linear.in_features,
        "out_features": layer.linear.out_features,
        "bias": layer.linear.bias is not None,
        "activation_function": f"{activation.__module__}.{activation.__qualname__}",
    }
    files.write_json(folder / "config.json", config)
    state = {f"linear.{name}": value.contiguous().cpu() for name, value in layer.linear.state_dict().items()}
    save_file(state, folder / "model.safetensors")


def read(folder: Path) -> Parts:
    """Read a model folder. A module that is not known raises RecipeError, a damaged file IntegrityError."""
    modules = _read_json(folder / "modules.json", [{"path": "", "type": "sentence_transformers.models.Transformer"}])
    kinds = [_kind(module.get("type", ""), folder) for module in modules]
    settings = _read_json(folder / "config_sentence_transformers.json", {})
    options: dict[str, Any] = {
        "prompts": {role: text for role, text in (settings.get("prompts") or {}).items() if text},
        "default_prompt_name": settings.get("default_prompt_name"),
        "head": [
            _read_layer(kind, folder / module["path"])
            for kind, module in zip(kinds, modules, strict=True)
            if kind in ("Dense", "Normalize")
        ],
    }
    if kinds[0] == "StaticEmbedding":
        return _read_static(folder / modules[0]["path"], options)
    pooling = next((folder / m["path"] for kind, m in zip(kinds, modules, strict=True) if kind == "Pooling"), None)
    if kinds[0] != "Transformer" or (pooling is None and len(kinds) > 1):
        raise RecipeError(
            f"{folder} holds {' > '.join(kinds)}; expected Transformer > Pooling > ... or StaticEmbedding > ..."
        )
    return _read_transformer(folder / modules[0]["path"], pooling, options)


def _kind(type_path: str, folder: Path) -> str:
    kind = type_path.rsplit(".", 1)[-1]
    known = ("Transformer", "StaticEmbedding", "Pooling", "Dense", "Normalize")
    if not type_path.startswith("sentence_transformers.") or kind not in known:
        raise RecipeError(
            f"{folder}/modules.json names the module {type_path!r}, which distill does not know ({', '.join(known)} are known). "
            "Remote code is never run; export the model without that module."
        )
    return kind


def _read_static(folder: Path, options: dict[str, Any]) -> Parts:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    truncation = tokenizer.truncation
    tokenizer.no_padding()
    tokenizer.no_truncation()
    state = _load_weights(folder)
    if "embedding.weight" not in state:
        raise IntegrityError(f"{folder}/model.safetensors has no embedding.weight; it holds {', '.join(state)}.")
    limit = truncation["max_length"] if truncation else UNLIMITED
    return Parts(backbone=StaticTable(state["embedding.weight"]), tokenizer=tokenizer, max_length=limit, **options)


def _read_transformer(folder: Path, pooling_folder: Path | None, options: dict[str, Any]) -> Parts:
    from transformers import AutoModel, AutoTokenizer

    settings = _read_json(folder / "sentence_bert_config.json", {})
    with _quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModel.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    config = model.config
    positions = getattr(config, "max_position_embeddings", None)
    limits = [int(limit) for limit in (tokenizer.model_max_length, positions) if limit and 0 < limit < UNLIMITED]
    max_length = settings.get("max_seq_length") or min(limits, default=512)
    pooling = _read_pooling(pooling_folder, config.hidden_size, options["prompts"])
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (config.pad_token_id or 0)
    backbone = TransformerBackbone(model, pooling, pad_id=int(pad), padding_side=tokenizer.padding_side)
    lowercase = bool(settings.get("do_lower_case"))
    return Parts(backbone=backbone, tokenizer=tokenizer, max_length=max_length, lowercase=lowercase, **options)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bar for a second's work, and no report of heads that an encoder does not have."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _read_pooling(folder: Path | None, hidden: int, prompts: Mapping[str, str]) -> Pooling:
    config = _read_json(folder / "config.json", {}) if folder else {}
    modes = config.get("pooling_mode") or [mode for key, mode in _LEGACY_POOLING.items() if config.get(key)] or ["mean"]
    if prompts and not config.get("include_prompt", True):
        raise RecipeError(
            f"{folder}/config.json leaves the prompt out of the pooling (include_prompt=false), which distill does not do."
        )
    return Pooling(hidden, [modes] if isinstance(modes, str) else modes)


def _read_layer(kind: str, folder: Path) -> Dense | Normalize:
    if kind == "Normalize":
        return Normalize()
    config = _read_json(folder / "config.json", {})
    unsupported = [key for key in ("use_residual",) if config.get(key)]
    unsupported += [
        f"{key}={config[key]}"
        for key in ("module_input_name", "module_output_name")
        if config.get(key, "sentence_embedding") not in ("sentence_embedding", None)
    ]
    if unsupported:
        raise RecipeError(f"{folder}/config.json asks for {', '.join(unsupported)}, which distill's Dense does not do.")
    activation = _activation(config.get("activation_function", "torch.nn.modules.activation.Tanh"), folder)
    layer = Dense(config["in_features"], config["out_features"], bias=config.get("bias", True), activation=activation)
    layer.linear.load_state_dict(
        {name.removeprefix("linear."): value.float() for name, value in _load_weights(folder).items()}
    )
    return layer


def _activation(path: str, folder: Path) -> nn.Module:
    module, _, name = path.rpartition(".")
    found = getattr(importlib.import_module(module), name, None) if module.startswith("torch.nn.modules.") else None
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise RecipeError(f"{folder}/config.json names the activation {path!r}; only the modules of torch.nn are run.")
    return found()


def _load_weights(folder: Path) -> dict[str, Tensor]:
    path = folder / "model.safetensors"
    if not path.exists():
        raise IntegrityError(
            f"{path} is missing. Weights are read from safetensors only; pickle files are never opened."
        )
    return load_file(path)


def _read_json(path: Path, default: Any) -> Any:
    if not path.exists():
        return default
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise IntegrityError(f"{path} is not JSON ({error}). Fetch the model again.") from error
