"""An embedding model: texts -> vectors. Reads and writes the sentence-transformers folder, with its own tokenizer and prompts."""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from tokenizers import Tokenizer
from torch import Tensor, nn
from tqdm.auto import tqdm

from distill import distributed, files, folder, hub
from distill.ahead import ahead
from distill.beginnings import beginnings
from distill.errors import RecipeError
from distill.folder import UNLIMITED, Parts
from distill.modules import Dense, StaticTable, Tokens, TransformerBackbone, Truncate, eval_mode
from distill.texts import refuse_one_text, refuse_what_is_no_text

WINDOW = 16_384  # texts that are sorted by length together; the more, the less padding
ComputeDtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Tokenized:
    """Tokens of some texts, and which of the texts were cut at max_length or have no token of their own."""

    tokens: Tokens
    truncated: list[bool]
    empty: list[bool]


class Encoder(nn.Module):
    """Backbone (transformer with pooling, or static table) followed by Dense, Normalize and Truncate layers: texts -> (n, width).

    `forward(tokens)` is what training calls; `encode(texts)` is the whole way, without gradient. `tokenizer` is this
    encoder's own: a student may read the same text with other tokens than its teacher.
    """

    def __init__(
        self,
        backbone: TransformerBackbone | StaticTable,
        tokenizer: Any,
        *,
        head: Sequence[nn.Module] = (),
        max_length: int = UNLIMITED,
        prompts: Mapping[str, str] | None = None,
        default_prompt_name: str | None = None,
        lowercase: bool = False,
        compute_dtype: ComputeDtype = "float32",
        name: str = "encoder",
        commit: str | None = None,
    ):
        super().__init__()
        self.backbone: TransformerBackbone | StaticTable = backbone
        self.head = nn.Sequential(*head)
        self.tokenizer, self.max_length, self.lowercase = tokenizer, max_length, lowercase
        self.prompts, self.default_prompt_name = dict(prompts or {}), default_prompt_name
        if default_prompt_name and default_prompt_name not in {"query", "document", *self.prompts}:
            raise RecipeError(
                f"{name}: the default prompt is {default_prompt_name!r}, but there is none of that name; there are "
                f"{', '.join(self.prompts) or 'none'}."
            )
        self.compute_dtype: ComputeDtype = compute_dtype
        self.name, self.commit = name, commit

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: Path | None = None,
        max_length: int | None = None,
        compute_dtype: ComputeDtype = "float32",
    ) -> "Encoder":
        """An encoder from a local folder, the Hub, or an installed weight package (`hub.resolve_model`), float32, in eval mode.

        A folder without modules.json is a bare transformer: mean pooling (of a causal language model the last token), no
        normalisation, as sentence-transformers reads it, but for the chat template that it puts texts into. `max_length` (tokens) overrides the folder's own. A module or setting that it does not know raises RecipeError.
        """
        if not isinstance(name, str | os.PathLike):
            raise TypeError(f"Encoder.from_pretrained takes a folder or a name, got {_kind_and_way(name)}")
        source = hub.resolve_model(str(name), revision=revision, token=token, cache_dir=cache_dir)
        parts = vars(folder.read(source.path))
        encoder = cls(**parts, compute_dtype=compute_dtype, name=source.name, commit=source.commit)
        if max_length is not None:
            least = encoder.special_token_count + 1
            if not least <= max_length <= encoder.max_length:
                raise RecipeError(f"max_length is {least}..{encoder.max_length} tokens for {name}, got {max_length}.")
            encoder.max_length = max_length
        return encoder.eval()

    @property
    def width(self) -> int:
        """Width of the vectors this encoder emits."""
        return min([self.full_width, *(layer.width for layer in self.head if isinstance(layer, Truncate))])

    @property
    def full_width(self) -> int:
        """Width before vectors are cut at truncate_dim."""
        dense = [layer for layer in self.head if isinstance(layer, Dense)]
        return dense[-1].linear.out_features if dense else self.backbone.width

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def parameter_count(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def special_token_count(self) -> int:
        """Tokens that stand around every text; they count towards max_length."""
        return 0 if isinstance(self.backbone, StaticTable) else self.tokenizer.num_special_tokens_to_add()

    def prompt(self, role: str | None) -> str:
        """The text put before every text of a role, as sentence-transformers chooses it.

        "query" and "document" have none unless it is named; without a role, or for one that has none, the default prompt.
        """
        prompts = {"query": "", "document": ""} | self.prompts
        return prompts.get(role or "", prompts.get(self.default_prompt_name or "", ""))

    def tokenize(self, texts: Sequence[str], *, prompt: str = "") -> Tokenized:
        """The tokens of texts, cut at max_length. A text that is no str, or no Unicode, is a DataError that names it."""
        refuse_one_text(texts)
        if not len(texts):
            return Tokenized(Tokens.from_lists([]), [], [])
        refuse_what_is_no_text(texts)
        texts = [prompt + text for text in texts]
        parts = texts if self._keeps_end else beginnings(texts, self.max_length, _backend(self.tokenizer))
        rows = self._rows(parts)
        again = [i for i, (_, cut, _) in enumerate(rows) if not cut and len(parts[i]) < len(texts[i])]
        if again:
            for i, row in zip(again, self._rows([texts[i] for i in again]), strict=True):
                rows[i] = row
        ids, truncated, empty = zip(*rows, strict=True)
        return Tokenized(Tokens.from_lists(ids), list(truncated), list(empty))

    @property
    def _keeps_end(self) -> bool:
        """Whether a text above max_length loses its beginning. A static table's loses its end."""
        return getattr(self.tokenizer, "truncation_side", "right") == "left"

    def _rows(self, texts: Sequence[str]) -> list[tuple[list[int], bool, bool]]:
        """Of each text its tokens, whether there were more, and whether it has none of its own."""
        texts = self._lowered(texts) if self.lowercase else texts
        if isinstance(self.backbone, StaticTable):
            encodings = self.tokenizer.encode_batch(texts, add_special_tokens=False)
            return [
                (row[: self.max_length], len(row) > self.max_length, not row) for row in (one.ids for one in encodings)
            ]
        batch = self.tokenizer(texts, truncation=True, max_length=self.max_length, return_special_tokens_mask=True)
        overflow = [bool(encoding.overflowing) for encoding in batch.encodings]
        empty = [all(special) for special in batch["special_tokens_mask"]]
        return list(zip(batch["input_ids"], overflow, empty, strict=True))

    def _lowered(self, texts: Sequence[str]) -> list[str]:
        """Lower case as tokenizers make it: character by character (no final sigma), special tokens left alone."""
        special = re.compile("(" + "|".join(map(re.escape, self.tokenizer.all_special_tokens)) + ")")
        # What stands at odd places is a special token.
        return ["".join(part if i % 2 else _lower(part) for i, part in enumerate(special.split(t))) for t in texts]

    def forward(self, tokens: Tokens) -> Float[Tensor, "b width"]:
        return self.head(self.backbone(tokens))

    @torch.no_grad()
    def encode(
        self, texts: Sequence[str], *, role: str | None = None, progress: str | None = None
    ) -> Float[Tensor, "n width"]:
        """Vectors of texts, float32 on the CPU, in their order. `progress` names the bar; None shows none.

        Runs in eval mode (the mode before is restored), sorted by length inside windows of 16,384 texts, each of which is
        tokenized while the one before is computed.
        """
        refuse_one_text(texts)
        texts = texts if isinstance(texts, Sequence) else list(texts)
        refuse_what_is_no_text(texts)
        vectors = torch.empty(len(texts), self.width)
        bar = tqdm(
            total=len(texts),
            desc=progress,
            unit="text",
            disable=distributed.hides_bars() if progress else True,
            delay=2,
        )
        prompt, starts = self.prompt(role), range(0, len(texts), WINDOW)
        windows = ((start, self.tokenize(texts[start : start + WINDOW], prompt=prompt).tokens) for start in starts)
        with eval_mode(self), bar:
            for start, window in ahead(windows) if len(starts) > 1 else windows:
                for index, tokens in window.grouped(8192):
                    vectors[start + index] = self.compute(tokens).cpu()
                    bar.update(len(index))
        return vectors

    @torch.no_grad()
    def encode_vocabulary(self) -> Float[Tensor, "v width"]:
        """The vector of each token of the vocabulary, alone between the special tokens. Cost: one short text a token."""
        self.require_transformer()
        with eval_mode(self):
            ids = torch.arange(len(self.tokenizer)).split(512)
            parts = [
                self.compute(self.single_tokens(part.tolist())).cpu()
                for part in tqdm(ids, desc="tokens", delay=2, disable=distributed.hides_bars())
            ]
        return torch.cat(parts)

    def require_transformer(self) -> None:
        """RecipeError for a static table: its tokens have no vectors of their own to be distilled again."""
        if isinstance(self.backbone, StaticTable):
            raise RecipeError(
                f"{self.name} is static already. Start from it with students.pretrained, in a recipe --student.kind pretrained --student.name."
            )

    def single_tokens(self, ids: Sequence[int]) -> Tokens:
        """Texts of one token each, between the special tokens that this tokenizer puts around a text."""
        probe = self.tokenizer("a", return_special_tokens_mask=True)
        special, around = probe["special_tokens_mask"], probe["input_ids"]
        first, last = special.index(0), len(special) - special[::-1].index(0)
        return Tokens.from_lists([[*around[:first], token, *around[last:]] for token in ids])

    def compute(self, tokens: Tokens) -> Float[Tensor, "b width"]:
        """One forward pass at this encoder's compute dtype, float32 out."""
        enabled = self.compute_dtype == "bfloat16"
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled):
            return self(tokens).float()

    def fingerprint(self) -> dict[str, str | int]:
        """Everything of this encoder that changes a vector, as a flat JSON object. Prompts are not in it: they are part of each text's key."""
        return {
            "weights": _hash_state(self),
            "tokenizer": _hash_text(_tokenizer_json(self.tokenizer)),
            "config": _hash_text(_config_json(self.backbone)),
            "modules": " > ".join([_describe(self.backbone), *[_describe(layer) for layer in self.head]]),
            "max_length": self.max_length,
            "lowercase": int(self.lowercase),
            "compute_dtype": self.compute_dtype,
            **({"truncation_side": "left"} if self._keeps_end else {}),
        }

    def save_pretrained(self, path: str | Path) -> None:
        """Write a folder that SentenceTransformer(path) and Encoder.from_pretrained(path) open. It appears whole or not at all.

        It takes the place of an earlier model's folder, of all files in it. RecipeError if `path` holds something else.
        """
        folder.refuse_other_files(Path(path))
        with files.published_folder(Path(path)) as temporary:
            folder.write(self.parts(), temporary)

    def parts(self) -> Parts:
        """What the model folder holds of this encoder."""
        return Parts(
            backbone=self.backbone,
            tokenizer=self.tokenizer,
            head=list(self.head),
            max_length=self.max_length,
            prompts=self.prompts,
            default_prompt_name=self.default_prompt_name,
            lowercase=self.lowercase,
        )


def require_encoder(model: object, where: str) -> None:
    """TypeError for another library's model, a function, or a name; it says how an Encoder is made of it."""
    if not isinstance(model, Encoder):
        raise TypeError(f"{where}: an Encoder is expected, got {_kind_and_way(model)}")


def _kind_and_way(model: object) -> str:
    """What was given for a model, and what to do with it."""
    if isinstance(model, str | Path):
        return f"{str(model)!r}. Open it: Encoder.from_pretrained({str(model)!r})."
    if hasattr(model, "save_pretrained"):
        way = "Save it, with its tokenizer, and open its folder: model.save_pretrained(path); Encoder.from_pretrained(path)."
    else:
        way = "Open a model by Encoder.from_pretrained(path); vectors alone, of an API say, go into a store by write_store (README)."
    return f"an object of {type(model).__module__}.{type(model).__qualname__}. {way}"


def _lower(text: str) -> str:
    return text.lower() if text.isascii() else "".join(map(str.lower, text))


def _hash_state(encoder: Encoder) -> str:
    state = encoder.state_dict()
    if isinstance(encoder.backbone, StaticTable):  # what is saved, and all that a vector depends on
        state = {name: value for name, value in state.items() if not name.startswith("backbone.")}
        state["backbone.table"] = encoder.backbone.folded()
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _hash_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _backend(tokenizer: Any) -> Tokenizer:
    return tokenizer if isinstance(tokenizer, Tokenizer) else tokenizer.backend_tokenizer


def _tokenizer_json(tokenizer: Any) -> str:
    state = json.loads(_backend(tokenizer).to_str())
    return json.dumps(
        {key: value for key, value in state.items() if key not in ("truncation", "padding")}, sort_keys=True
    )


def _config_json(backbone: nn.Module) -> str:
    if not isinstance(backbone, TransformerBackbone):
        return "static"
    noise = {"_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache"}
    noise |= {"id2label", "label2id", "problem_type"}
    # What differs from the defaults: a new release of transformers adds defaults, and changes no vector by that.
    config = {key: value for key, value in backbone.model.config.to_diff_dict().items() if key not in noise}
    return json.dumps(config, sort_keys=True, default=str)


def _describe(layer: nn.Module) -> str:
    if isinstance(layer, TransformerBackbone):
        return f"{type(layer.model).__name__} > {'+'.join(layer.pooling.modes)}"
    if isinstance(layer, Dense):
        return f"Dense({layer.linear.in_features}, {layer.linear.out_features}, {type(layer.activation).__name__})"
    return f"Truncate({layer.width})" if isinstance(layer, Truncate) else type(layer).__name__
