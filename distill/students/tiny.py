"""A small transformer that starts as the static student, and can learn what a static one cannot: word order."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from distill.encoder import Encoder
from distill.errors import RecipeError
from distill.modules import Dense, Normalize, Pooling, TransformerBackbone
from distill.students.blocks import transformer_of
from distill.students.projection import last_linear
from distill.students.summary import named
from distill.students.token_table import static

LONGEST = 512  # positions, if the teacher reads more
FULLEST = 0.8  # of a token's squared length that its vector may take: what is left keeps all tokens at one length
PLACED = 0.15  # of the same, for its position
SHORTEST = 8  # tokens to a wave, of the fastest one; each next one is four times as long


def tiny(
    teacher: Encoder,
    *,
    layers: int = 2,
    width: int = 128,
    token_vectors: Float[Tensor, "v e"] | None = None,
    texts: Sequence[str] | None = None,
    max_length: int | None = None,
    seed: int = 0,
) -> Encoder:
    """A BERT of few narrow layers that begins exactly as `static(teacher, width=read_width(width))`, and reads the teacher's tokens.

    Its token table is the static student's table times its token weights; a Dense layer leads back to the teacher's width
    along the principal directions. A BERT brings every token to one length, which would undo the weights: a direction that
    the Dense layer does not read takes up what a token's weight leaves. Positions are waves in further directions that it
    does not read: the blocks, which give 0 at first, see order from the first step on. So it is for tokens around a text.
    `token_vectors` and `texts` are as in `static`; `max_length` is the teacher's, at most 512. No dropout. 30,000 tokens at
    width 128 are 4.4M parameters.
    """
    require_sizes(teacher, layers, width)
    start = static(teacher, width=read_width(width), token_vectors=token_vectors, texts=texts)
    length = min(teacher.max_length, LONGEST) if max_length is None else max_length
    if not teacher.special_token_count < length <= teacher.max_length:
        least = teacher.special_token_count + 1
        raise RecipeError(f"max_length is {least}..{teacher.max_length} for {teacher.name}, got {max_length}.")
    model = _bert(teacher, layers, width, length, seed)
    table: Any = start.backbone
    basis, scale = _basis(width), _fill(model, table.folded(), _around(teacher.tokenizer))
    student = Encoder(
        TransformerBackbone(model, Pooling(width), pad_id=model.config.pad_token_id),
        teacher.tokenizer,
        head=[Dense(width, teacher.width), Normalize()],
        max_length=length,
        prompts=teacher.prompts,
        default_prompt_name=teacher.default_prompt_name,
        lowercase=teacher.lowercase,
    )
    with torch.no_grad():
        last_linear(student).weight.copy_(last_linear(start).weight @ basis[:, -read_width(width) :].T / scale)
    return named(student, f"tiny-{layers}x{width}", teacher)


def require_sizes(teacher: Encoder, layers: int, width: int) -> None:
    """RecipeError for layers and a width that a tiny student of this teacher cannot have."""
    teacher.require_transformer()
    if layers < 1 or width < 8 or read_width(width) > teacher.width:
        raise RecipeError(
            f"a tiny student of {teacher.name} has 1 layer or more and width 8 or more, of which the Dense layer reads at most "
            f"{teacher.width}; got {layers=}, {width=}, of which it reads {read_width(width)}."
        )


def read_width(width: int) -> int:
    """Directions of a tiny student that its Dense layer reads: all but the ones, the rest of a token's length, and the waves."""
    return width - 2 - 2 * _waves(width)


def _bert(teacher: Encoder, layers: int, width: int, length: int, seed: int) -> Any:
    """A BERT without dropout, whose blocks give 0: what they read is drawn as usual, and learns from the second step on."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=len(teacher.tokenizer),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=next(heads for heads in range(max(1, width // 32), 0, -1) if width % heads == 0),
        intermediate_size=4 * width,
        max_position_embeddings=length,
        type_vocab_size=1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=1 / math.sqrt(width),
        pad_token_id=transformer_of(teacher).pad_id,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(seed)  # alone: the other devices' stay as they are
        model: Any = BertModel(config, add_pooling_layer=True)
        for layer in model.encoder.layer:
            layer.attention.output.dense.weight.zero_()
            layer.output.dense.weight.zero_()
        model.embeddings.position_embeddings.weight.copy_(_positions(length, width))
        model.embeddings.token_type_embeddings.weight.zero_()
        for parameter in model.pooler.parameters():
            parameter.zero_()  # never run
    return model.eval()


@torch.no_grad()
def _fill(model: Any, vectors: Float[Tensor, "v useful"], around: Sequence[int]) -> float:
    """Write the token table: vectors along the last directions, and along the first what brings a token to one length.

    Gives the factor that the vectors were multiplied by. With a position, the mean of a token's entries is 0 and the mean
    of their squares 1: a layer norm leaves it as it is.
    """
    table = model.embeddings.word_embeddings.weight
    width = table.shape[1]
    useful = vectors.index_fill(0, torch.tensor(around, dtype=torch.long), 0.0)
    scale = math.sqrt(FULLEST * width) / float(useful.norm(dim=1).max())
    rest = ((1 - PLACED) * width - (scale * useful).square().sum(dim=1)).sqrt()
    waves = torch.zeros(len(useful), 2 * _waves(width))
    table.copy_(torch.cat([rearrange(rest, "v -> v 1"), waves, scale * useful], dim=1) @ _basis(width).T)
    return scale


def _waves(width: int) -> int:
    return max(1, width // 32)


def _positions(length: int, width: int) -> Float[Tensor, "length width"]:
    """Sines and cosines of positions, of one length at every position, along the directions between rest and vectors."""
    count = _waves(width)
    angles = rearrange(torch.arange(length), "l -> l 1") * 2 * math.pi / (SHORTEST * 4.0 ** torch.arange(count))
    waves = torch.cat([angles.sin(), angles.cos()], dim=1) * math.sqrt(PLACED * width / count)
    return waves @ _basis(width)[:, 1 : 1 + 2 * count].T


def _basis(width: int) -> Float[Tensor, "width directions"]:
    """Orthonormal directions that are all at right angles to the ones, so that a layer norm takes nothing from them."""
    ones = torch.ones(width, 1, dtype=torch.float64)
    return torch.linalg.qr(torch.cat([ones, torch.eye(width, dtype=torch.float64)[:, 1:]], dim=1)).Q[:, 1:].float()


def _around(tokenizer: Any) -> list[int]:
    """Tokens that stand around or between texts, and say nothing; the unknown token stands for a word."""
    return sorted(set(tokenizer.all_special_ids) - {tokenizer.unk_token_id})
