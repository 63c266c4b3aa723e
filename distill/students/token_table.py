"""A table of token vectors: the teacher's own output for each token, on its principal directions."""

from collections import Counter
from collections.abc import Sequence

import torch
from jaxtyping import Float
from tokenizers import Tokenizer
from torch import Tensor

from distill.alignment import principal_directions
from distill.encoder import Encoder
from distill.errors import DataError, RecipeError
from distill.folder import UNLIMITED
from distill.modules import Dense, Normalize, StaticTable
from distill.students.projection import last_linear
from distill.students.summary import named
from distill.students.vocabulary import Vocabulary, bare_tokenizer, fit_vocabulary
from distill.texts import refuse_one_text

SIF_SMOOTHING = 3e-4  # Arora et al. 2017: a token of probability p weighs a / (a + p)


def static(
    teacher: Encoder,
    *,
    width: int = 256,
    vocabulary: Vocabulary | Sequence[str] | None = None,
    token_vectors: Float[Tensor, "v e"] | None = None,
    word_vectors: Float[Tensor, "w e"] | None = None,
    texts: Sequence[str] | None = None,
) -> Encoder:
    """A table of token vectors: the teacher's own output for each token, on its `width` principal directions.

    A text is the weighted mean of its tokens, brought to the teacher's width by a Dense layer that starts as the
    principal directions themselves. Token weights are SIF over the tokens of `texts`, or Zipf's law by token id.
    `vocabulary` is `fit_vocabulary`'s, or a corpus, whose tokens are kept; None: the teacher's whole vocabulary.
    `token_vectors` are `embed.embed_vocabulary`'s, by the teacher's ids, and `word_vectors` the teacher's of
    `vocabulary.words`; what is not given the teacher computes here.
    """
    require_width(teacher, width)
    if texts is not None:
        refuse_one_text(texts)
    if vocabulary is not None and not isinstance(vocabulary, Vocabulary):
        texts = vocabulary if texts is None else texts
        vocabulary = fit_vocabulary(teacher, vocabulary)
    vectors = teacher.encode_vocabulary() if token_vectors is None else token_vectors
    _refuse_other_vectors(teacher, vectors)
    if vocabulary is not None:
        words = teacher.encode(vocabulary.words, progress="words") if word_vectors is None else word_vectors
        vectors = vocabulary.vectors(vectors, words)
    tokenizer = bare_tokenizer(teacher) if vocabulary is None else vocabulary.tokenizer
    kind = f"static-{width}" + ("" if vocabulary is None else f"-{len(vocabulary)}-tokens")
    return named(_built(teacher, tokenizer, vectors, width, texts), kind, teacher)


def require_width(teacher: Encoder, width: int) -> None:
    """RecipeError for a width that a static student of this teacher cannot have, or for a teacher that is static itself."""
    teacher.require_transformer()
    if not 1 <= width <= teacher.width:
        raise RecipeError(f"a static student of {teacher.name} has width 1..{teacher.width}, got {width}.")


def _refuse_other_vectors(teacher: Encoder, vectors: Tensor) -> None:
    expected, found = (len(teacher.tokenizer), teacher.width), tuple(vectors.shape)
    if found != expected or not vectors.isfinite().all():
        numbers = "" if vectors.isfinite().all() else " with NaN or infinite numbers"
        raise DataError(
            f"token vectors of {teacher.name} are finite and {expected}, one for each token id, got {found}{numbers}."
        )


def _built(
    teacher: Encoder, tokenizer: Tokenizer, vectors: Float[Tensor, "v e"], width: int, texts: Sequence[str] | None
) -> Encoder:
    mean, directions = _principal_directions(vectors, width)
    table = StaticTable((vectors - mean) @ directions.T, _token_weights(tokenizer, len(vectors), texts))
    student = Encoder(table, tokenizer, head=[Dense(width, teacher.width), Normalize()], max_length=UNLIMITED)
    with torch.no_grad():
        last_linear(student).weight.copy_(directions.T)
    return student


def _principal_directions(
    vectors: Float[Tensor, "v e"], width: int
) -> tuple[Float[Tensor, " e"], Float[Tensor, "width e"]]:
    mean = vectors.double().mean(dim=0)
    centred = vectors.double() - mean
    return mean.float(), principal_directions(centred.T @ centred, width).T.float()


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
