"""distill's losses in sentence-transformers' own trainer: the teacher's vectors come in the `label` column.

    loss = DistillLoss(model, CrossKL())
    SentenceTransformerTrainer(model, train_dataset=dataset, loss=loss).train()

It stands below `distributed`, which it needs, and imports nothing of sentence-transformers: the trainer is the caller.
"""

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from distill import distributed
from distill.losses.scores import MarginMSE, ScoreKL
from distill.similarity import check_tensor
from distill.streaming import engine

HOW = 'dataset.map(lambda rows: {"label": teacher.encode(rows["text"]).tolist()}, batched=True)'


class DistillLoss(nn.Module):
    """One of distill's losses as a SentenceTransformerTrainer calls it: `loss(sentence_features, labels)`.

    Equals the mean over text columns of loss(model(column)["sentence_embedding"], teacher, bank). Labels are the
    teacher's vectors: (b, e), for every column the same; or (b, columns, e), a vector of its own for each.
    `bank` and `bank_keys` are those of the loss, and the same on every process; `keys` finds a column's own, as
    `token_keys` does. On several processes value and gradient are those of the global batch.
    For a teacher of another width append sentence-transformers' Dense to the model: it is trained and saved with it.
    Schedules of a WeightedSum need a TrainerCallback: `loss.set_progress(state.global_step / state.max_steps)`.
    """

    bank: Tensor | None
    bank_keys: Tensor | None

    def __init__(
        self,
        model: nn.Module,
        loss: nn.Module,
        *,
        bank: Float[Tensor, "n e"] | None = None,
        bank_keys: Int[Tensor, "n"] | None = None,
        keys: Callable[[Mapping[str, Any]], Int[Tensor, "b"]] | None = None,
    ) -> None:
        super().__init__()
        _check_loss(loss, {"bank": bank, "bank_keys": bank_keys, "keys": keys})
        if bank is not None:
            _check_bank(bank)
        if bank_keys is not None and (bank is None or keys is None):
            raise ValueError("DistillLoss got bank_keys without bank and keys. Give all three: keys=token_keys.")
        self.model, self.loss, self.keys = model, loss, keys
        self.register_buffer("bank", bank, persistent=False)
        self.register_buffer("bank_keys", bank_keys, persistent=False)

    def forward(
        self, sentence_features: Iterable[Mapping[str, Any]], labels: Tensor | Sequence[Tensor] | None
    ) -> Float[Tensor, ""]:
        columns = list(sentence_features)
        teachers = self._teachers(labels, len(columns))
        self._check_rows(teachers)
        keys = [None if self.keys is None else self.keys(features) for features in columns]
        values = [self._value(*column) for column in zip(columns, teachers, keys, strict=True)]
        return torch.stack(values).mean()

    def _value(
        self, features: Mapping[str, Any], teacher: Float[Tensor, "b e"], keys: Int[Tensor, "b"] | None
    ) -> Float[Tensor, ""]:
        student = self.model(features)["sentence_embedding"]
        teacher = teacher.to(student.device, engine.working_dtype(student))
        return distributed.global_loss(self.loss, student, teacher, bank=self.bank, keys=keys, bank_keys=self.bank_keys)

    def _teachers(self, labels: Tensor | Sequence[Tensor] | None, columns: int) -> list[Float[Tensor, "b e"]]:
        """Teacher vectors of each text column."""
        if labels is None:
            raise ValueError(f"DistillLoss needs the teacher's vectors in a column named label. Make them: {HOW}.")
        if isinstance(labels, Tensor):
            one_each = labels.ndim == 3
            teachers = list(rearrange(labels, "b columns e -> columns b e")) if one_each else [labels] * columns
        else:
            teachers = list(labels)
        for teacher in teachers:
            _check_labels(teacher, self.bank)
        if len(teachers) != columns or not teachers:
            raise ValueError(
                f"DistillLoss has {columns} text columns and labels for {len(teachers)} of them. Give labels (b, e), for "
                f"every column the same, or (b, {columns}, e), a vector for each: {HOW}."
            )
        return teachers

    def _check_rows(self, teachers: Sequence[Tensor]) -> None:
        """Finite rows; and on every process one loss and as many columns, else they wait for ever. All raise, or none.

        Labels come anew in each step, so no check before the run sees them. This one waits for the device; so does the
        trainer, which asks each step's loss for NaN (logging_nan_inf_filter) and, by default, hides what it found.
        """
        mine, different = zlib.crc32(repr(self.loss).encode()), {id(teacher): teacher for teacher in teachers}.values()
        bad = sum(int((~teacher.isfinite().all(dim=-1)).sum()) for teacher in different)
        signature = torch.tensor([[mine, len(teachers), teachers[0].shape[-1], bad]], device=teachers[0].device)
        everyone = distributed.gather_rows(signature, [1] * distributed.world_size())
        if (everyone[:, :3] != signature[:, :3]).any():
            raise ValueError(
                "DistillLoss is a loss of all processes' rows together, and in this step they have different losses, "
                f"numbers of text columns, or widths: {everyone[:, 1:3].tolist()}. Train several datasets with one loss "
                'and as many columns, or set accelerator_config={"split_batches": True}: a batch is then of one dataset.'
            )
        if everyone[:, 3].any():
            raise ValueError(
                f"DistillLoss got labels of which {int(everyone[:, 3].sum())} rows are not finite: one step on them makes the whole "
                'student NaN. Leave their texts out: dataset.filter(lambda row: numpy.isfinite(row["label"]).all()).'
            )

    def set_progress(self, progress: float) -> None:
        """The run's progress, from 0 to 1, for a loss that follows it."""
        setter = getattr(self.loss, "set_progress", None)
        if setter is not None:
            setter(progress)

    def get_config_dict(self) -> dict[str, Any]:
        """For the model card."""
        return {"loss": " ".join(repr(self.loss).split()), "bank": None if self.bank is None else list(self.bank.shape)}

    def extra_repr(self) -> str:
        return "" if self.bank is None else f"bank={tuple(self.bank.shape)}"


def token_keys(features: Mapping[str, Any]) -> Int[Tensor, "b"]:
    """A key for each text, by its tokens: equal for equal tokens, wherever the padding stands.

    Of a batch's features: a bank has its keys by `token_keys(model.preprocess(texts))`, with the dataset's prompt. Texts
    that differ only behind max_length are equal. Other texts collide with a probability of 2^-64.
    """
    ids = features["input_ids"].long()
    if "offsets" in features:  # a static model: one row of tokens for all texts
        position, starts = torch.arange(len(ids), device=ids.device), features["offsets"]
        rows = torch.searchsorted(starts, position, right=True) - 1
        position, tokens, count = position - starts[rows], ids, len(starts)
    elif "attention_mask" in features and ids.ndim == 2:
        kept = features["attention_mask"] > 0
        rows, position, tokens, count = kept.nonzero()[:, 0], (kept.cumsum(-1) - 1)[kept], ids[kept], len(ids)
    else:
        raise ValueError(
            f"token_keys reads input_ids beside an attention_mask or offsets, got {sorted(features)}. Give DistillLoss a "
            "keys= of your own, or flattened inputs (Flash Attention) no keys."
        )
    return ids.new_zeros(count).index_add_(0, rows, _mixed(tokens * 0x9E3779B97F4A7C1 + position * 0x2545F4914F6CDD1D))


def _mixed(values: Int[Tensor, "t"]) -> Int[Tensor, "t"]:
    """Every bit of the result depends on all: sums of such values collide as random ones do. Stafford 2011, Mix13."""
    values = (values ^ (values >> 30)) * -0x40A7B892E31B1A47
    values = (values ^ (values >> 27)) * -0x6B2FB644ECCEEE15
    return values ^ (values >> 31)


def _check_loss(loss: nn.Module, given: Mapping[str, object]) -> None:
    if not isinstance(loss, nn.Module):
        raise TypeError(f"DistillLoss takes a loss as a Module, such as CrossKL(temperature=0.05), got {loss!r}.")
    of_scores = [type(part).__name__ for part in loss.modules() if isinstance(part, ScoreKL | MarginMSE)]
    if of_scores:
        raise ValueError(
            f"DistillLoss compares vectors, and {of_scores[0]} compares scores. Take a loss of vectors here, or "
            "sentence-transformers' own DistillKLDivLoss or MarginMSELoss for labels that are scores."
        )
    unused = [name for name, value in given.items() if value is not None]
    if unused and not getattr(loss, "uses_bank", False):
        raise ValueError(
            f"{type(loss).__name__} uses no bank and no keys, and DistillLoss got {', '.join(unused)}. Leave them out, or "
            "take a cross loss: CrossKL, CrossContrastive."
        )


def _check_bank(bank: Tensor) -> None:
    check_tensor("DistillLoss", bank, "bank")
    if bank.ndim != 2 or not bank.is_floating_point() or not bank.isfinite().all():
        raise ValueError(
            f"DistillLoss takes a bank of finite teacher vectors (rows, width), got {bank.dtype} {tuple(bank.shape)}"
            f"{'' if bank.is_floating_point() else ', which is no float'}. Give those of one teacher, without NaN."
        )


def _check_labels(labels: Tensor, bank: Tensor | None) -> None:
    if not isinstance(labels, Tensor) or not labels.is_floating_point():
        kind = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(
            f"DistillLoss takes the teacher's vectors as labels, float tensors; got {kind}. Make them: {HOW}."
        )
    if labels.ndim != 2:
        raise ValueError(
            "DistillLoss takes the teacher's vectors as labels, (b, e) or (b, columns, e), got one column of "
            f"{tuple(labels.shape)}. Make them: {HOW}."
        )
    if labels.requires_grad:
        raise ValueError(
            "DistillLoss got labels that require a gradient: the teacher has none. Encode under torch.no_grad(), or "
            "detach() them."
        )
    if bank is not None and bank.shape[-1] != labels.shape[-1]:
        raise ValueError(
            f"DistillLoss has a bank {tuple(bank.shape)} and labels {tuple(labels.shape)} of another width. Both are vectors of "
            "one teacher. If MatryoshkaLoss cut the labels: DistillLoss(model, Matryoshka(CrossKL(), (64, 128)), bank=bank)."
        )
