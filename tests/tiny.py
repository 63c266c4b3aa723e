"""Tiny models with random weights and real tokenizers, written as sentence-transformers folders in milliseconds.

Weights are drawn wide (std 0.3), so that two texts have vectors that differ clearly: with the usual 0.02 a wrong pooling passes.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    AlbertConfig,
    AlbertModel,
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    ModernBertConfig,
    ModernBertModel,
    MPNetConfig,
    MPNetModel,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2Model,
    RobertaConfig,
    RobertaModel,
)

WIDTH = 32
LAYERS = 6
MAX_LENGTH = 64
SENTENCES = [
    "A man is playing a large flute in the garden behind the house.",
    "The stock market fell sharply after the bank raised its rates.",
    "How do I return a pair of shoes that I bought two weeks ago?",
    "Two dogs run across a field of snow.",
    "The vaccine trial was stopped because of an unexplained illness.",
    "What is the capital of Mongolia, and how cold does it get there?",
    "She bakes bread every morning before the children wake up.",
    "Rust and Python can call each other through a small binding.",
    "Please cancel my subscription at the end of this month.",
    "The old bridge over the river is closed to trucks.",
    "An orchestra is tuning its instruments.",
    "Interest rates and inflation move together, most of the time.",
]


def bert(folder: Path, *, layers: int = LAYERS, lowercase: bool = True, **options: Any) -> Path:
    """A BERT; the other builders are alike. `options` are those of `save`."""
    tokenizer = wordpiece(lowercase=lowercase)
    config = BertConfig(**_sizes(tokenizer, layers), intermediate_size=2 * WIDTH, max_position_embeddings=MAX_LENGTH)
    return save(folder, _random(BertModel, config), tokenizer, **options)


def bert_cls_dense(folder: Path, **options: Any) -> Path:
    """As LaBSE: the first token, Dense with tanh, Normalize."""
    return bert(folder, layers=2, **{"pooling": ["cls"], "head": [dense(WIDTH, 24, "Tanh"), "Normalize"]} | options)


def mpnet(folder: Path, *, layers: int = LAYERS, **options: Any) -> Path:
    tokenizer = wordpiece("<s>", "</s>")
    config = MPNetConfig(
        **_sizes(tokenizer, layers), intermediate_size=2 * WIDTH, max_position_embeddings=MAX_LENGTH + 2
    )
    return save(folder, _random(MPNetModel, config), tokenizer, **options)


def roberta(folder: Path, *, layers: int = 4, **options: Any) -> Path:
    """The one whose positions begin behind that of the padding."""
    tokenizer = wordpiece("<s>", "</s>")
    config = RobertaConfig(
        **_sizes(tokenizer, layers), intermediate_size=2 * WIDTH, max_position_embeddings=MAX_LENGTH + 2
    )
    return save(folder, _random(RobertaModel, config), tokenizer, **options)


def modernbert(folder: Path, *, layers: int = 4, **options: Any) -> Path:
    """Rotary positions, and layers that see the nearest tokens alone."""
    tokenizer = wordpiece()
    config = ModernBertConfig(
        **_sizes(tokenizer, layers),
        intermediate_size=2 * WIDTH,
        max_position_embeddings=MAX_LENGTH,
        local_attention=8,
        reference_compile=False,
    )
    return save(folder, _random(ModernBertModel, config), tokenizer, **options)


def qwen(folder: Path, *, layers: int = 4, padding_side: str = "right", **options: Any) -> Path:
    """A decoder with rotary positions and a list of layer types; its tokenizer puts nothing around a text."""
    tokenizer = byte_pairs(padding_side)
    config = Qwen2Config(
        **_sizes(tokenizer, layers),
        intermediate_size=2 * WIDTH,
        max_position_embeddings=MAX_LENGTH,
        num_key_value_heads=2,
        use_sliding_window=True,
        sliding_window=8,
        max_window_layers=layers // 2,
    )
    return save(folder, _random(Qwen2Model, config), tokenizer, **{"pooling": ["lasttoken"]} | options)


def distilbert(folder: Path, *, layers: int = 4, **options: Any) -> Path:
    """The one whose config says n_layers and dim."""
    tokenizer = wordpiece()
    config = DistilBertConfig(
        vocab_size=len(tokenizer),
        dim=WIDTH,
        n_layers=layers,
        n_heads=4,
        hidden_dim=2 * WIDTH,
        max_position_embeddings=MAX_LENGTH,
        initializer_range=0.3,
    )
    return save(folder, _random(DistilBertModel, config), tokenizer, **options)


def albert(folder: Path, *, layers: int = 4, **options: Any) -> Path:
    """The one whose layers are one layer, run several times."""
    tokenizer = wordpiece()
    config = AlbertConfig(
        **_sizes(tokenizer, layers), embedding_size=16, intermediate_size=WIDTH, max_position_embeddings=MAX_LENGTH
    )
    return save(folder, _random(AlbertModel, config), tokenizer, **options)


def t5(folder: Path, *, layers: int = 3, kind: str = "T5", whole: bool = False, **options: Any) -> Path:
    """An encoder whose layers share a position bias (of UMT5: each has its own); `whole`: with the decoder it was trained with."""
    tokenizer = wordpiece()
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=len(tokenizer), d_model=WIDTH, d_kv=8, num_heads=4, d_ff=2 * WIDTH, num_layers=layers, pad_token_id=0
    )
    model = getattr(transformers, f"{kind}{'' if whole else 'Encoder'}Model")
    return save(folder, _random(model, config), tokenizer, **options)


def save(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    *,
    pooling: Sequence[str] = ("mean",),
    head: Sequence[str | dict[str, Any]] = ("Normalize",),
    prompts: dict[str, str] | None = None,
    default_prompt_name: str | None = None,
    max_length: int | None = MAX_LENGTH,
    do_lower_case: bool = False,
    old_style: bool = True,
) -> Path:
    """Write the folder by hand. `old_style` is sentence-transformers before 6: other type paths, one boolean a pooling mode."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if max_length is not None:
        write_json(folder / "sentence_bert_config.json", {"max_seq_length": max_length, "do_lower_case": do_lower_case})
    names = ["Transformer", "Pooling", *(layer if isinstance(layer, str) else "Dense" for layer in head)]
    paths = ["", *(f"{number}_{name}" for number, name in enumerate(names) if number)]
    modules = zip(names, paths, strict=True)
    write_json(
        folder / "modules.json",
        [
            {"idx": number, "name": str(number), "path": path, "type": _type(name, old_style)}
            for number, (name, path) in enumerate(modules)
        ],
    )
    for path, layer in zip(paths[2:], head, strict=True):
        (folder / path).mkdir()
        if isinstance(layer, dict):
            write_json(folder / path / "config.json", layer["config"])
            save_file(layer["state"], folder / path / "model.safetensors")
    (folder / "1_Pooling").mkdir()
    write_json(folder / "1_Pooling" / "config.json", _pooling(pooling, old_style))
    settings = {"prompts": prompts or {}, "default_prompt_name": default_prompt_name, "similarity_fn_name": "cosine"}
    write_json(folder / "config_sentence_transformers.json", settings)
    return folder


def dense(inside: int, outside: int, activation: str = "Tanh") -> dict[str, Any]:
    generator = torch.Generator().manual_seed(7)
    return {
        "config": {
            "in_features": inside,
            "out_features": outside,
            "bias": True,
            "activation_function": f"torch.nn.modules.{'linear' if activation == 'Identity' else 'activation'}.{activation}",
        },
        "state": {
            "linear.weight": torch.randn(outside, inside, generator=generator) / inside**0.5,
            "linear.bias": torch.randn(outside, generator=generator) / 10,
        },
    }


def wordpiece(start: str = "[CLS]", end: str = "[SEP]", *, lowercase: bool = True) -> PreTrainedTokenizerFast:
    """Whole words of the sentences, and single characters for all others."""
    words = {word for text in SENTENCES for word in _words(text.lower())}
    characters = sorted(set("".join(words)))
    pieces = ["[PAD]", "[UNK]", start, end, "[MASK]"]
    pieces += [*characters, *(f"##{one}" for one in characters), *sorted(words - set(characters))]
    core = Tokenizer(models.WordPiece({piece: number for number, piece in enumerate(pieces)}, unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    core.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}",
        pair=f"{start} $A {end} $B {end}",
        special_tokens=[(token, pieces.index(token)) for token in (start, end)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        model_max_length=MAX_LENGTH,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token=start,
        sep_token=end,
        mask_token="[MASK]",
    )


def byte_pairs(padding_side: str = "right") -> PreTrainedTokenizerFast:
    """Bytes, and the commonest pairs of the sentences as merges."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("Ġ", "a"), ("i", "n"), ("o", "n"), ("e", "r"), ("r", "e")]
    pieces = ["<|endoftext|>", *symbols, *(first + second for first, second in merges)]
    core = Tokenizer(models.BPE({piece: number for number, piece in enumerate(pieces)}, merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        model_max_length=MAX_LENGTH,
        pad_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        padding_side=padding_side,
    )


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _words(text: str) -> list[str]:
    return [word for word, _ in pre_tokenizers.BertPreTokenizer().pre_tokenize_str(text)]


def _sizes(tokenizer: PreTrainedTokenizerFast, layers: int) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "initializer_range": 0.3,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _random(kind: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(config).eval()


def _type(name: str, old_style: bool) -> str:
    if old_style:
        return f"sentence_transformers.models.{name}"
    package = "sentence_transformer" if name == "Pooling" else "base"
    return f"sentence_transformers.{package}.modules.{name.lower()}.{name}"


def _pooling(modes: Sequence[str], old_style: bool) -> dict[str, Any]:
    if not old_style:
        return {
            "embedding_dimension": WIDTH,
            "pooling_mode": modes[0] if len(modes) == 1 else list(modes),
            "include_prompt": True,
        }
    keys = {"cls": "cls_token", "max": "max_tokens", "mean": "mean_tokens"}
    keys |= {"mean_sqrt_len_tokens": "mean_sqrt_len_tokens", "weightedmean": "weightedmean_tokens"}
    keys |= {"lasttoken": "lasttoken"}
    booleans = {f"pooling_mode_{key}": mode in modes for mode, key in keys.items()}
    return {"word_embedding_dimension": WIDTH} | booleans | {"include_prompt": True}
