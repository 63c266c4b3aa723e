"""What the notebooks share: a teacher, and where none is installed a small random one that stands in for it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from distill.encoder import Encoder
from distill.errors import ResourceError

WORDS = 3000  # of the stand-in's vocabulary at most


def teacher_or_stand_in(name: str, texts: Sequence[str], folder: str | Path, *, max_length: int = 64) -> Encoder:
    """The named model, or where it cannot be had a small BERT of random weights that reads `texts`; prints which.

    The stand-in is written into `folder`. It knows little more than which words two texts share: enough to see that
    everything runs, and no picture or number of it means anything.
    """
    try:
        teacher = Encoder.from_pretrained(name, max_length=max_length)
    except ResourceError as reason:
        print(f"A random stand-in is used, because of this: {reason}")
        return _stand_in(texts, Path(folder), max_length)
    print(f"{teacher.name}: {teacher.parameter_count / 1e6:.0f}M parameters, width {teacher.width}")
    return teacher


def _stand_in(texts: Sequence[str], folder: Path, max_length: int) -> Encoder:
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertConfig, BertModel, BertTokenizer

    words = BertWordPieceTokenizer()
    words.train_from_iterator(texts, vocab_size=WORDS, show_progress=False)
    sizes: dict[str, Any] = {
        "hidden_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 512,
    }
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = BertModel(BertConfig(vocab_size=words.get_vocab_size(), initializer_range=0.1, **sizes))
    for table in (model.embeddings.position_embeddings, model.embeddings.token_type_embeddings):
        torch.nn.init.zeros_(table.weight)  # else all texts look alike to it
    model.save_pretrained(folder)
    BertTokenizer(tokenizer_object=words._tokenizer).save_pretrained(folder)
    return Encoder.from_pretrained(folder, max_length=max_length)
