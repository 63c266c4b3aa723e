"""Ways to make a student. Each returns an Encoder that emits vectors in the teacher's space, ready to train."""

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from tokenizers import Tokenizer, normalizers
from torch import Tensor, nn

from distill.encoder import Encoder
from distill.errors import RecipeError
from distill.folder import UNLIMITED
from distill.heads import Projection
from distill.modules import Dense, Normalize, StaticTable, TransformerBackbone
from distill.similarity import normalize

SIF_SMOOTHING = 3e-4  # Arora et al. 2017: a token of probability p weighs a / (a + p)


def static(
    teacher: Encoder,
    *,
    width: int = 256,
    token_vectors: Float[Tensor, "v e"] | None = None,
    texts: Sequence[str] | None = None,
) -> Encoder:
    """A table of token vectors: the teacher's own output for each token, on its `width` principal directions.

    A text is the weighted mean of its tokens, brought to the teacher's width by a Dense layer that starts as the
    principal directions themselves. Token weights are SIF over the tokens of `texts`, or Zipf's law by token id.
    `token_vectors` are `embed.embed_vocabulary`'s; without them the teacher runs over its vocabulary here.
    """
    teacher.require_transformer()
    vectors = teacher.encode_vocabulary() if token_vectors is None else token_vectors
    if not 1 <= width <= vectors.shape[1]:
        raise RecipeError(f"a static student of {teacher.name} has width 1..{vectors.shape[1]}, got {width}.")
    tokenizer = _bare_tokenizer(teacher)
    mean, directions = _principal_directions(vectors, width)
    table = StaticTable((vectors - mean) @ directions.T, _token_weights(tokenizer, len(vectors), texts))
    student = Encoder(table, tokenizer, head=[Dense(width, teacher.width), Normalize()], max_length=UNLIMITED)
    with torch.no_grad():
        _projection(student).weight.copy_(directions.T)
    return _named(student, f"static-{width}", teacher)


def keep_layers(teacher: Encoder, layers: int | Sequence[int] = 3, *, projection: bool = False) -> Encoder:
    """A copy of the teacher with some of its layers: a count (the lowest ones and the last) or their numbers from 0.

    Any Hugging Face encoder whose layers stand in one list. `projection` adds a Dense layer of the teacher's width that
    starts as the identity. The embeddings, the pooling and the teacher's own Dense layers are kept.
    """
    if not isinstance(teacher.backbone, TransformerBackbone):
        raise RecipeError(f"{teacher.name} is a static table; it has no layers to keep.")
    total = teacher.backbone.model.config.num_hidden_layers
    kept = [*range(layers - 1), total - 1][: max(0, layers)] if isinstance(layers, int) else list(layers)
    if not kept or kept != sorted(set(kept)) or not 0 <= kept[0] <= kept[-1] < total:
        raise RecipeError(
            f"{teacher.name} has layers 0..{total - 1}; asked to keep {layers}. Name rising numbers, or a count."
        )
    model = _with_layers(teacher.backbone.model, kept, teacher.name)
    parts = vars(copy.copy(teacher.parts())) | {"head": copy.deepcopy(list(teacher.head))}
    parts["backbone"] = TransformerBackbone(model, teacher.backbone.pooling, pad_id=teacher.backbone.pad_id)
    if projection:
        parts["head"] = [
            *(layer for layer in parts["head"] if isinstance(layer, Dense)),
            Dense(teacher.width, teacher.width),
            Normalize(),
        ]
    student = Encoder(**parts)
    if projection:
        nn.init.eye_(_projection(student).weight)
    return _named(student, f"layers-{'-'.join(map(str, kept))}", teacher)


def pretrained(name: str | Path, teacher: Encoder, **options: Any) -> Encoder:
    """Another model as the start, with a Dense layer to the teacher's width if its own differs. `options` as Encoder.from_pretrained."""
    student = Encoder.from_pretrained(name, **options)
    head = [layer for layer in student.head if isinstance(layer, Dense)]
    if student.width != teacher.width:
        head.append(Dense(student.width, teacher.width))
    parts = vars(student.parts()) | {"head": [*head, Normalize()]}
    start = Encoder(**parts, compute_dtype=student.compute_dtype, commit=student.commit)
    return _named(start, Path(str(name)).name, teacher)


@torch.no_grad()
def fit_projection(
    student: Encoder,
    texts: Sequence[str] | Mapping[str, Sequence[str]],
    vectors: Float[Tensor, "n e"],
    *,
    ridge: float | None = None,
) -> None:
    """Set the student's last Dense layer to the ridge regression from its vectors of `texts` to the teacher's `vectors`.

    Closed form over all rows whose vector is finite and not zero; `ridge=None` chooses the penalty on held-out rows.
    `texts` may be by role, with `vectors` in the same order. Cost: one pass of the student.
    """
    last, head = _projection(student), student.head
    place = next(number for number, layer in enumerate(head) if getattr(layer, "linear", None) is last)
    activation = head[place].activation
    if not isinstance(activation, nn.Identity):
        raise RecipeError(
            f"{student.name} ends in a Dense layer with {activation}, which no regression can see through. "
            "Put one without activation behind it (keep_layers: projection=True)."
        )
    student.head = nn.Sequential(*list(head)[:place])
    try:
        by_role = texts.items() if isinstance(texts, Mapping) else [(None, texts)]
        inputs = torch.cat([student.encode(some, role=role, progress="projection") for role, some in by_role])
    finally:
        student.head = head
    # Rows enter as directions: the student is compared by cosine, so a long text must not count for more.
    good = vectors.isfinite().all(dim=1) & vectors.any(dim=1)
    last.weight.copy_(Projection.ridge(normalize(inputs[good]), vectors[good], ridge=ridge).weight)
    if last.bias is not None:
        last.bias.zero_()


def freeze_token_table(student: Encoder) -> None:
    """Leave a transformer's input embeddings out of training: on a CPU their dense update costs more than the layers'."""
    if not isinstance(student.backbone, TransformerBackbone):
        raise RecipeError(f"{student.name} is a static table; frozen, it would have nothing left to learn.")
    student.backbone.model.get_input_embeddings().requires_grad_(False)


def describe(student: Encoder) -> str:
    count = student.parameter_count
    return f"{student.name}: {count / 1e6:.1f}M parameters, {4 * count / 1e6:.0f} MB, width {student.width}"


def _named(student: Encoder, kind: str, teacher: Encoder) -> Encoder:
    student.name = f"{Path(teacher.name).name}-{kind}"
    return student.eval()


def _projection(student: Encoder) -> nn.Linear:
    dense = [layer for layer in student.head if isinstance(layer, Dense)]
    if not dense:
        raise RecipeError(f"{student.name} has no Dense layer to fit; build it with projection=True.")
    return dense[-1].linear


def _principal_directions(
    vectors: Float[Tensor, "v e"], width: int
) -> tuple[Float[Tensor, " e"], Float[Tensor, "width e"]]:
    mean = vectors.double().mean(dim=0)
    centred = vectors.double() - mean
    _, directions = torch.linalg.eigh(centred.T @ centred)
    directions = directions.flip(1)[:, :width].T
    signs = directions.gather(1, directions.abs().argmax(dim=1, keepdim=True)).sign()  # eigh's signs are arbitrary
    return mean.float(), (directions * signs).float()


def _token_weights(tokenizer: Tokenizer, size: int, texts: Sequence[str] | None) -> Float[Tensor, " v"]:
    if texts is None:
        frequencies = 1 / torch.arange(2.0, size + 2)
    else:
        counts = Counter(
            token
            for encoding in tokenizer.encode_batch(list(texts), add_special_tokens=False)
            for token in encoding.ids
        )
        frequencies = torch.tensor([counts[token] + 1.0 for token in range(size)])
    return SIF_SMOOTHING / (SIF_SMOOTHING + frequencies / frequencies.sum())


def _bare_tokenizer(teacher: Encoder) -> Tokenizer:
    tokenizer = Tokenizer.from_str(teacher.tokenizer.backend_tokenizer.to_str())
    tokenizer.no_padding()
    tokenizer.no_truncation()
    if teacher.lowercase:
        before = [tokenizer.normalizer] if tokenizer.normalizer else []
        tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), *before])
    return tokenizer


def _with_layers(model: Any, kept: Sequence[int], name: str) -> nn.Module:
    total = model.config.num_hidden_layers
    lists = [(path, m) for path, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == total]
    if len(lists) != 1:
        raise RecipeError(
            f"{name} has {len(lists)} lists of {total} layers; keep_layers needs exactly one. Start from students.pretrained."
        )
    path, layers = lists[0]
    parent, _, attribute = path.rpartition(".")
    chosen = nn.ModuleList(layers[number] for number in kept)
    setattr(model.get_submodule(parent), attribute, chosen)
    try:
        copied = copy.deepcopy(model)  # copies the kept layers only
    finally:
        setattr(model.get_submodule(parent), attribute, layers)
    for key, value in vars(copied.config).items():
        if isinstance(value, list) and len(value) == total:  # layer_types and the like
            setattr(copied.config, key, [value[number] for number in kept])
    copied.config.num_hidden_layers = len(kept)
    for number, layer in enumerate(copied.get_submodule(path)):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = number
    return copied
