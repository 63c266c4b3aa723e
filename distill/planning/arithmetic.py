"""Bytes of a run, term by term: of the device while it trains, and of the disk.

The activations of a step follow from those of a few texts, which are run on the CPU to see what is kept for the backward
pass: so much a token, so much a text.
"""

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import nn

from distill import distributed
from distill.encoder import Encoder
from distill.losses import CosineDistance, EmbeddingMSE
from distill.modules import StaticTable, Tokens, TransformerBackbone
from distill.store import Format
from distill.streaming import engine
from distill.students.summary import stored_bytes
from distill.training import Examples, TrainConfig, execution, sampling
from distill.training.table_rows import WINDOW

PROBE_TEXTS = 16
STEPS = 20  # that are looked at for their largest batch, and rehearsed

Size = tuple[int, int, int]  # 1, padded tokens, texts


def memory(
    teacher: Encoder,
    student: Encoder,
    examples: Examples,
    loss: nn.Module,
    config: TrainConfig,
    device: torch.device,
    *,
    width: int,
) -> dict[str, int]:
    """Bytes on a process's device by term, at the worst: all of them at once. Sums up to the peak, but for what libraries take.

    `examples` may be some of the texts that the run will have; `width` is that of the vectors to train on.
    """
    table = _rows(student, config)
    trained = _bytes(p for p in student.parameters() if p.requires_grad and p is not table)
    rows = 0 if table is None else table.nbytes
    share = -(-config.batch_size // distributed.world_size())
    bank = min(config.bank_size, len(examples)) if getattr(loss, "uses_bank", False) else 0
    copies = 1 if distributed.world_size() == 1 else 2  # DDP sends gradients from buckets of its own
    lent = 0 if table is None else _used(examples, config) * table[0].nbytes
    return {
        "weights: teacher": _bytes(teacher.parameters()),
        "weights: student": _bytes(student.parameters()),
        "weights: the untrained start": _bytes(student.parameters()),
        "gradients": copies * trained + 2 * lent,
        "optimiser": 2 * trained + 2 * rows,
        **({"average of the weights": trained + rows} if config.ema_decay else {}),
        "activations": activations(student, examples, config, device),
        "loss": _loss(loss, share, bank + config.batch_size, width),
        "bank": 4 * bank * width,
    }


def activations(student: Encoder, examples: Examples, config: TrainConfig, device: torch.device) -> int:
    """Bytes kept for the backward pass by the largest of some batches, as far as this process runs it at once.

    Where layers keep their inputs alone, those of one layer, which is run again, come on top.
    """
    if config.gradient_checkpointing:
        plain = replace(config, gradient_checkpointing=False, compile=False)
        one_layer = activations(student, examples, plain, device) // len(execution.layers(student))
        with execution.as_asked(student, replace(plain, gradient_checkpointing=True)):
            return one_layer + activations(student, examples, plain, device)
    order = examples.tokens.lengths.argsort()
    spread = order[torch.linspace(0, len(order) - 1, min(PROBE_TEXTS, len(order))).long()]
    probes = [spread, spread[::2], spread[len(spread) // 2 :]]
    sizes, kept = zip(*(_kept(student, examples, rows, config) for rows in probes), strict=True)
    a_term = np.linalg.lstsq(np.array(sizes, float), np.array(kept, float), rcond=None)[0]  # once, a token, a text
    return int(max(np.array(size) @ a_term for size in _sizes(student, examples, config, device)))


def vectors(rows: int, width: int, form: Format) -> int:
    """Bytes of so many rows of a store, with their keys, token counts and flags."""
    return rows * (form.row_bytes(width) + 21)


def disk(student: Encoder, config: TrainConfig, steps: int, *, world: int) -> dict[str, int]:
    """Bytes written by term, beside `vectors`; logs and reports, 300 bytes a step and some hundred thousand, come on top."""
    trained = _bytes(p for p in student.parameters() if p.requires_grad)
    average = trained if config.ema_decay else 0
    table = _rows(student, config)
    backbone = student.backbone
    start = backbone.table.nbytes if config.start_decay and isinstance(backbone, StaticTable) else 0
    last = 0 if table is None else 4 * len(table) + 7 * 8 * (WINDOW + 1)
    one = _bytes(student.state_dict().values()) + 2 * trained + average + start + last
    one += world * torch.get_rng_state().nbytes
    every = config.save_every or max(1, steps // 10)
    kept = min(config.keep_checkpoints, -(-steps // every))
    tokenizer = student.tokenizer if isinstance(student.tokenizer, Tokenizer) else student.tokenizer.backend_tokenizer
    return {
        f"checkpoints: {kept} that stay": kept * one,
        "checkpoints: one as it is written": one,
        "student": stored_bytes(student) + len(tokenizer.to_str(pretty=True).encode()),
    }


def _rows(student: Encoder, config: TrainConfig) -> nn.Parameter | None:
    """The table that is updated row by row, if one is."""
    backbone = student.backbone
    return backbone.table if config.table_update == "rows" and isinstance(backbone, StaticTable) else None


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _used(examples: Examples, config: TrainConfig) -> int:
    """Different tokens of a step, the most of some."""
    return max(len(examples.tokens.rows(rows).ids.unique()) for rows in _batches(examples, config, config.accumulation))


def _batches(examples: Examples, config: TrainConfig, accumulation: int = 1) -> list[torch.Tensor]:
    """Rows of the batches of the first steps."""
    parts = [
        sampling.batches(
            step, len(examples), batch_size=config.batch_size * accumulation, accumulation=1, seed=config.seed
        )
        for step in range(STEPS)
    ]
    return [torch.from_numpy(batch) for batches in parts for batch in batches]


def _sizes(student: Encoder, examples: Examples, config: TrainConfig, device: torch.device) -> list[Size]:
    """Of what is run at once with its graph, in each of some batches."""
    sizes = []
    for rows in _batches(examples, config):
        share = examples.tokens.lengths[rows].sort(descending=True).values[:: distributed.world_size()]
        pieces = -(-len(share) // (config.micro_batch or len(share)))
        longest = share[: -(-len(share) // pieces)]
        sizes.append((1, _padded(student, longest, device), len(longest)))
    return sizes


def _padded(student: Encoder, lengths: torch.Tensor, device: torch.device) -> int:
    if not isinstance(student.backbone, TransformerBackbone):
        return int(lengths.sum())
    tokens = Tokens(torch.zeros(int(lengths.sum()), dtype=torch.int32), lengths)
    return tokens.padded(student.backbone.token_budget(device))


def _kept(student: Encoder, examples: Examples, rows: torch.Tensor, config: TrainConfig) -> tuple[Size, int]:
    """The size of some texts, and the bytes that their forward pass keeps beside the weights."""
    tokens = examples.tokens.rows(rows)
    own = {p.untyped_storage().data_ptr() for p in student.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    enabled = config.mixed_precision == "bf16"
    training = student.training
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled),
    ):
        vectors = student.train(config.dropout)(tokens)
    student.train(training)
    del vectors  # the graph holds what was kept until here, so that no place was taken twice
    return (1, _padded(student, tokens.lengths, torch.device("cpu")), len(rows)), sum(kept.values())


def _loss(loss: nn.Module, rows: int, columns: int, width: int) -> int:
    """Rows of both sides with a gradient, unit rows of the columns, and the part of the matrix that is held at once, on a CPU."""
    vectors = 6 * 4 * rows * width
    if isinstance(loss, CosineDistance | EmbeddingMSE):
        return vectors
    part = min(rows * columns, max(engine.TILE**2, 256 * columns))
    return vectors + 4 * min(columns * width, engine.KEPT) + 2 * 4 * part
