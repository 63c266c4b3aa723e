"""The sentence-transformers folder: modules.json, one sub-folder a module, safetensors and JSON only.

Module types are written as `sentence_transformers.models.NAME`, the path that 5.4 and 6.x both open without remote code.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from distill import files
from distill.errors import IntegrityError, RecipeError
from distill.model_files import has_vocabulary
from distill.modules import Dense, Normalize, Pooling, StaticTable, TransformerBackbone, Truncate
from distill.quantized import INT8_MODULE, TableFormat, read_table, stored, table_tensors

SETTINGS = "config_sentence_transformers.json"
OF_THE_SYSTEM = {".DS_Store", "Thumbs.db", "desktop.ini"}  # put into a folder by whoever shows it
UNLIMITED = 10**9  # max_length of a static table: it has no positions to run out of
_ENCODERS = {"t5": "T5EncoderModel", "mt5": "MT5EncoderModel", "umt5": "UMT5EncoderModel"}  # AutoModel adds the decoder
# Where releases of sentence-transformers have put max_seq_length: by the name of the model, at first.
_SETTINGS_NAMES = [
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
]
_TEXT = {"method": "forward", "method_output_name": "last_hidden_state"}  # how its modality_config says: as a text
_OF_LOADING = {"trust_remote_code", "dtype", "torch_dtype", "attn_implementation", "device_map", "low_cpu_mem_usage"}
_OF_TOKENIZING = {"trust_remote_code", "use_fast", "padding_side"}
# Arguments that may stand in those settings, with what changes no vector.
_ARGUMENTS: dict[str, set[str]] = {
    "model_args": _OF_LOADING,
    "model_kwargs": _OF_LOADING,
    "config_args": {"trust_remote_code"},
    "config_kwargs": {"trust_remote_code"},
    "tokenizer_args": _OF_TOKENIZING,
    "processor_kwargs": _OF_TOKENIZING,
    "processing_kwargs": set(),
}
_LEGACY_POOLING = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


Kind = Literal["model", "head"]


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


def refuse_other_files(path: Path, kind: Kind = "model") -> None:
    """RecipeError if `path` is neither an empty folder nor an earlier model's, or head's: a new one takes the whole folder's place."""
    found = {item.name for item in path.iterdir()} if path.is_dir() else {"a file"} if path.exists() else set()
    names = found - OF_THE_SYSTEM
    if names and (".git" in names or _held(path, names) != kind):
        raise RecipeError(
            f"{path} is there already, and is not a {kind}'s folder or is a Git repository: a {kind} would take the place of all in it. "
            f"Name a new folder, an empty one, or that of an earlier {kind}."
        )


def _held(path: Path, names: set[str]) -> Kind | None:
    """What a folder is; that of a head holds what `save_head` writes, and nothing else."""
    try:
        head = "nb_proxy" in read_json(path / "config.json", {})
    except IntegrityError:
        head = False
    if head:
        return "head" if names == {"config.json", "model.safetensors"} else None
    return "model" if names & {"modules.json", "config.json"} else None


def write(parts: Parts, folder: Path) -> None:
    """Write the files of an encoder into an existing, empty folder. RecipeError for a layer that such a folder cannot hold."""
    head, cut = _split(parts.head)
    backbone = parts.backbone
    form: TableFormat = backbone.stored_as if isinstance(backbone, StaticTable) else "float32"
    names = ["StaticEmbedding"] if isinstance(backbone, StaticTable) else ["Transformer", "Pooling"]
    names += [type(layer).__name__ for layer in head]
    modules = [
        {"idx": i, "name": str(i), "path": f"{i}_{name}" if i else "", "type": f"sentence_transformers.models.{name}"}
        for i, name in enumerate(names)
    ]
    if form == "int8":
        modules[0]["type"] = INT8_MODULE
    for module in modules[1:]:
        (folder / str(module["path"])).mkdir()
    if isinstance(backbone, StaticTable):
        _write_static(backbone, parts, folder)
    else:
        _write_transformer(backbone, parts, folder)
    for module, layer in zip(modules[len(modules) - len(head) :], head, strict=True):
        if isinstance(layer, Dense):
            _write_dense(layer, folder / str(module["path"]), form)
        else:
            files.write_json(folder / str(module["path"]) / "config.json", {})
    files.write_json(folder / "modules.json", modules)
    prompts = {"query": "", "document": ""} | parts.prompts
    files.write_json(
        folder / SETTINGS,
        {
            "model_type": "SentenceTransformer",
            "prompts": prompts,
            "default_prompt_name": parts.default_prompt_name,
            "similarity_fn_name": "cosine",
            "truncate_dim": cut,
        },
    )


def _write_static(backbone: StaticTable, parts: Parts, folder: Path) -> None:
    save_file(table_tensors(backbone.folded().cpu(), backbone.stored_as), folder / "model.safetensors")
    tokenizer = Tokenizer.from_str(parts.tokenizer.to_str())
    tokenizer.no_padding()
    if parts.max_length < UNLIMITED:
        tokenizer.enable_truncation(parts.max_length)
    tokenizer.save(str(folder / "tokenizer.json"))


def _write_transformer(backbone: TransformerBackbone, parts: Parts, folder: Path) -> None:
    with _quiet_transformers():
        backbone.model.save_pretrained(folder)
    parts.tokenizer.save_pretrained(folder)
    files.write_json(
        folder / "sentence_bert_config.json", {"max_seq_length": parts.max_length, "do_lower_case": parts.lowercase}
    )
    pooling = backbone.pooling
    modes: dict[str, Any] = {key: mode in pooling.modes for key, mode in _LEGACY_POOLING.items()}
    if _legacy_modes(modes) != list(pooling.modes):  # booleans, which all versions read, have one order
        modes = {"pooling_mode": list(pooling.modes)}
    files.write_json(
        folder / "1_Pooling" / "config.json",
        {"word_embedding_dimension": pooling.hidden} | modes | {"include_prompt": True},
    )


def _write_dense(layer: Dense, folder: Path, form: TableFormat) -> None:
    activation = type(layer.activation)
    config = {
        "in_features": layer.linear.in_features,
        "out_features": layer.linear.out_features,
        "bias": layer.linear.bias is not None,
        "activation_function": f"{activation.__module__}.{activation.__qualname__}",
    }
    files.write_json(folder / "config.json", config)
    state = {f"linear.{name}": stored(value, form).cpu() for name, value in layer.linear.state_dict().items()}
    save_file(state, folder / "model.safetensors")


def _split(head: Sequence[nn.Module]) -> tuple[list[Dense | Normalize], int | None]:
    """The layers that become modules, and truncate_dim: a cut stands behind all of them."""
    cut = head[-1].width if head and isinstance(head[-1], Truncate) else None
    layers = list(head)[: None if cut is None else -1]
    for layer in layers:
        _check_writable(layer)
    return [layer for layer in layers if isinstance(layer, Dense | Normalize)], cut


def _check_writable(layer: nn.Module) -> None:
    """Refuse what would be read as something else: a foreign layer, and an activation with options or code of its own."""
    if not isinstance(layer, Dense | Normalize):
        raise RecipeError(
            f"a model folder holds Dense and Normalize layers behind the backbone, not {type(layer).__name__}. "
            "Fold it into a Dense layer, or take it off before saving."
        )
    if isinstance(layer, Dense):
        kind = type(layer.activation)
        plain = kind.__module__.startswith("torch.nn.modules.") and not [*layer.activation.parameters()]
        if not plain or repr(layer.activation) != repr(kind()):
            raise RecipeError(
                f"a Dense layer is saved with a torch.nn activation at its defaults, not {layer.activation!r}."
            )


def read(folder: Path) -> Parts:
    """Read a model folder. A module that is not known raises RecipeError, a damaged file IntegrityError."""
    modules = _modules(folder)
    kinds = [kind for kind, _ in modules]
    start = 1 if kinds[0] == "StaticEmbedding" or kinds == ["Transformer"] else 2
    if kinds[:start] not in (["StaticEmbedding"], ["Transformer"], ["Transformer", "Pooling"]) or {*kinds[start:]} - {
        "Dense",
        "Normalize",
    }:
        raise RecipeError(
            f"{folder} holds {' > '.join(kinds)}; expected Transformer > Pooling, or StaticEmbedding, and then "
            "any Dense and Normalize."
        )
    settings = read_json(folder / SETTINGS, {})
    cut = settings.get("truncate_dim")
    if cut is not None and (not isinstance(cut, int) or cut < 1):
        raise RecipeError(f"{folder}/{SETTINGS}: truncate_dim is 1 or more, or null, got {cut!r}.")
    options: dict[str, Any] = {
        "prompts": {role: text or "" for role, text in (settings.get("prompts") or {}).items()},
        "default_prompt_name": settings.get("default_prompt_name"),
        "head": [_read_layer(kind, path) for kind, path in modules[start:]] + ([] if cut is None else [Truncate(cut)]),
    }
    if kinds[0] == "StaticEmbedding":
        return _read_static(modules[0][1], options)
    return _read_transformer(modules[0][1], modules[1][1] if start == 2 else None, options)


def _modules(folder: Path) -> list[tuple[str, Path]]:
    """Kind and folder of each module, in their order."""
    bare = [{"path": "", "type": "sentence_transformers.models.Transformer"}]
    modules = read_json(folder / "modules.json", bare, list)
    found = []
    for module in modules:
        path = module.get("path") if isinstance(module, dict) else None
        if not isinstance(path, str) or not isinstance(module.get("type"), str):
            raise IntegrityError(f"{folder}/modules.json: a module has a path and a type, got {module!r}.")
        if PurePosixPath(path).is_absolute() or ".." in path.replace("\\", "/").split("/"):
            raise RecipeError(f"{folder}/modules.json points outside the folder, to {path!r}.")
        found.append((_kind(module["type"], folder), folder / path))
    if not found:
        raise IntegrityError(f"{folder}/modules.json names no module. Fetch the model again.")
    return found


def _kind(type_path: str, folder: Path) -> str:
    kind = "StaticEmbedding" if type_path == INT8_MODULE else type_path.rsplit(".", 1)[-1]
    known = ("Transformer", "StaticEmbedding", "Pooling", "Dense", "Normalize")
    if not (type_path.startswith("sentence_transformers.") or type_path == INT8_MODULE) or kind not in known:
        raise RecipeError(
            f"{folder}/modules.json names the module {type_path!r}, which distill does not know ({', '.join(known)} are known). "
            "Remote code is never run; export the model without that module."
        )
    return kind


def _read_static(folder: Path, options: dict[str, Any]) -> Parts:
    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # tokenizers raises nothing narrower
        raise IntegrityError(f"{folder}/tokenizer.json cannot be read ({error}). Fetch the model again.") from error
    truncation = tokenizer.truncation
    tokenizer.no_padding()
    tokenizer.no_truncation()
    state = load_weights(folder)
    try:
        table = read_table(state)
    except ValueError as error:
        raise IntegrityError(f"{folder}/model.safetensors is damaged: {error}. Fetch the model again.") from error
    if table is None:
        raise IntegrityError(f"{folder}/model.safetensors has no embedding.weight; it holds {', '.join(state)}.")
    largest = max(tokenizer.get_vocab().values())
    if largest >= len(table):
        raise IntegrityError(f"{folder} has {len(table)} token vectors, and its tokenizer has ids up to {largest}.")
    limit = truncation["max_length"] if truncation else UNLIMITED
    return Parts(backbone=StaticTable(table), tokenizer=tokenizer, max_length=limit, **options)


def _read_transformer(folder: Path, pooling_folder: Path | None, options: dict[str, Any]) -> Parts:
    settings = _read_settings(folder)
    tokenizer, model = _load_transformer(folder)
    config = model.config
    two_halves = config.is_encoder_decoder and type(model).__name__ not in _ENCODERS.values()
    if two_halves or not isinstance(getattr(config, "hidden_size", None), int):
        raise RecipeError(f"{folder} holds a {type(model).__name__}; expected an encoder or a decoder of texts alone.")
    config.use_cache = False  # of keys and values, for a text that goes on: never here
    asked = settings.get("max_seq_length")
    limits = [int(limit) for limit in (asked or tokenizer.model_max_length, _positions(model)) if limit and limit > 0]
    max_length = min((limit for limit in limits if limit < UNLIMITED), default=512)
    usual = "lasttoken" if pooling_folder is None and _is_causal(config) else "mean"
    pooling = _read_pooling(pooling_folder, config.hidden_size, options["prompts"], usual)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (config.pad_token_id or 0)
    known = 0 <= pad < model.get_input_embeddings().num_embeddings
    return Parts(
        backbone=TransformerBackbone(model, pooling, pad_id=int(pad) if known else 0),  # padding is masked
        tokenizer=tokenizer,
        max_length=max_length,
        lowercase=bool(settings.get("do_lower_case")),
        **options,
    )


def _read_settings(folder: Path) -> dict[str, Any]:
    """How texts are cut and written. RecipeError for a setting by which sentence-transformers makes other vectors than distill would."""
    path = next((path for name in _SETTINGS_NAMES if (path := folder / name).exists()), folder / _SETTINGS_NAMES[0])
    settings = read_json(path, {})
    modalities = settings.get("modality_config") or {"text": _TEXT}
    unlike = [name for name in ("query_length", "document_length", "query_expansion") if settings.get(name)]
    unlike += (
        [] if settings.get("transformer_task", "feature-extraction") == "feature-extraction" else ["transformer_task"]
    )
    unlike += [] if "message" not in modalities and modalities.get("text") == _TEXT else ["modality_config"]
    for name, harmless in _ARGUMENTS.items():
        unlike += [f"{name}.{key}" for key in settings.get(name) or {} if key not in harmless]
    if unlike:
        raise RecipeError(
            f"{path} sets {', '.join(unlike)}, which changes how texts are read, and which distill does not do. Its vectors would "
            "be others than sentence-transformers'."
        )
    return settings


def _positions(model: nn.Module) -> int | None:
    """How many tokens a model has positions for. RoBERTa and its like count them from behind that of the padding."""
    positions = getattr(model.config, "max_position_embeddings", None)
    tables = [part for name, part in model.named_modules() if name.endswith("position_embeddings")]
    behind = [table.padding_idx + 1 for table in tables if getattr(table, "padding_idx", None) is not None]
    return positions - max(behind, default=0) if positions else None


def _is_causal(config: Any) -> bool:
    """Whether the whole model writes on from left to right, so that only its last token has read the text."""
    names = config.architectures or [""]
    return names[0].endswith("ForCausalLM") and getattr(config, "is_causal", True)


def _load_transformer(folder: Path) -> tuple[Any, Any]:
    import transformers

    config = read_json(folder / "config.json", {})
    if not config:
        raise IntegrityError(f"{folder}/config.json is missing or empty. Fetch the model again.")
    if not has_vocabulary(folder):
        raise IntegrityError(
            f"{folder} holds no tokenizer (tokenizer.json, vocab.txt, vocab.json with merges.txt, or a SentencePiece .model): "
            f"no word would be known. {_save_tokenizer(folder)}"
        )
    safe = {"local_files_only": True, "trust_remote_code": False}
    try:
        with _quiet_transformers():
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **safe)
            model, report = getattr(transformers, _ENCODERS.get(config.get("model_type"), "AutoModel")).from_pretrained(
                folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **safe
            )
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise IntegrityError(f"{folder} is damaged or not whole ({reason}). Fetch the model again.") from error
    except Exception as error:  # of five libraries; an unknown architecture is the commonest
        reason = " ".join(str(error).split())[:300]
        raise RecipeError(f"transformers cannot open {folder} ({type(error).__name__}: {reason}).") from error
    if not tokenizer.is_fast:
        raise RecipeError(f"{folder} has no fast tokenizer (tokenizer.json); save it once with one, in transformers.")
    known, embedded = len(tokenizer), getattr(model.config, "vocab_size", 0)
    if known < embedded // 10:  # a larger table than vocabulary is usual: sizes are rounded up, words kept for later
        raise IntegrityError(
            f"{folder}: the tokenizer knows {known:,} tokens, and the model has {embedded:,}. They do not belong together. "
            f"{_save_tokenizer(folder)}"
        )
    _complete(model, report["missing_keys"], folder)
    return tokenizer, model


def _save_tokenizer(folder: Path) -> str:
    return f"Save the model's own there: AutoTokenizer.from_pretrained(ORIGINAL).save_pretrained({str(folder)!r})."


def _complete(model: nn.Module, missing: Iterable[str], folder: Path) -> None:
    """Refuse weights that transformers has drawn at random, but for a pooler, which is never run: it becomes zero."""
    poolers = {name for name in missing if "pooler" in name.split(".")}
    if others := sorted(set(missing) - poolers):
        raise IntegrityError(
            f"{folder}: {len(others)} weights that config.json asks for are not in the file, {others[0]} first. "
            "Config and weights do not belong together; fetch the model again."
        )
    for name in poolers:
        nn.init.zeros_(model.get_parameter(name))


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


def _read_pooling(folder: Path | None, hidden: int, prompts: Mapping[str, str], usual: str) -> Pooling:
    if folder and not (folder / "config.json").exists():
        raise IntegrityError(f"{folder}/config.json is missing: it says how to pool. Fetch the model again.")
    config = read_json(folder / "config.json", {}) if folder else {}
    modes: Any = config.get("pooling_mode") or _legacy_modes(config) or [usual]
    if any(prompts.values()) and not config.get("include_prompt", True):
        raise RecipeError(
            f"{folder}/config.json leaves the prompt out of the pooling (include_prompt=false), which distill does not do."
        )
    modes = [modes] if isinstance(modes, str) else modes
    try:
        return Pooling(hidden, modes)
    except ValueError as error:
        raise RecipeError(f"{folder}/config.json: {error}") from error


def _legacy_modes(config: Mapping[str, Any]) -> list[str]:
    return [mode for key, mode in _LEGACY_POOLING.items() if config.get(key)]


def _read_layer(kind: str, folder: Path) -> Dense | Normalize:
    if kind == "Normalize":
        return Normalize()
    config = read_json(folder / "config.json", {})
    unsupported = [key for key in ("use_residual",) if config.get(key)]
    unsupported += [
        f"{key}={config[key]}"
        for key in ("module_input_name", "module_output_name")
        if config.get(key, "sentence_embedding") not in ("sentence_embedding", None)
    ]
    if unsupported:
        raise RecipeError(f"{folder}/config.json asks for {', '.join(unsupported)}, which distill's Dense does not do.")
    activation = _activation(config.get("activation_function", "torch.nn.modules.activation.Tanh"), folder)
    weights = {name.removeprefix("linear."): value.float() for name, value in load_weights(folder).items()}
    try:
        layer = Dense(
            config["in_features"], config["out_features"], bias=config.get("bias", True), activation=activation
        )
        layer.linear.load_state_dict(weights)
    except (KeyError, RuntimeError, TypeError) as error:
        raise IntegrityError(f"{folder}: config.json and the weights do not belong together ({error}).") from error
    return layer


def _activation(path: str, folder: Path) -> nn.Module:
    name = path.rpartition(".")[2]
    found = getattr(nn, name, None) if path.startswith("torch.nn.") else None
    if isinstance(found, type) and issubclass(found, nn.Module):
        try:
            return found()
        except TypeError:  # torch.nn.Linear and others that want sizes
            pass
    raise RecipeError(f"{folder}/config.json names the activation {path!r}; only those of torch.nn are run.")


def load_weights(folder: Path) -> dict[str, Tensor]:
    """What its model.safetensors holds. IntegrityError if that is missing or damaged."""
    path = folder / "model.safetensors"
    if not path.exists():
        raise IntegrityError(
            f"{path} is missing. Weights are read from safetensors only; pickle files are never opened."
        )
    try:
        return load_file(path)
    except SafetensorError as error:
        raise IntegrityError(f"{path} is damaged ({error}). Fetch the model again.") from error


def read_json(path: Path, default: Any, kind: type = dict) -> Any:
    """A value of this kind, or the default if there is no such file. IntegrityError for anything else."""
    if not path.exists():
        return default
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise IntegrityError(f"{path} is not JSON ({error}). Fetch the model again.") from error
    if not isinstance(value, kind):
        raise IntegrityError(
            f"{path} holds a {type(value).__name__}, expected a {kind.__name__}. Fetch the model again."
        )
    return value
