"""distill's losses in sentence-transformers' own trainer: on real, tiny models, in one process and in two."""

import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import processes
import pytest
import sentence_transformers
import tiny
import torch
from datasets import Dataset, Features, List, Value
from packaging.version import Version
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback

from distill import distributed
from distill.losses import (
    CosineDistance,
    CrossContrastive,
    CrossKL,
    GramKL,
    Matryoshka,
    ScoreKL,
    WeightedSum,
    cross_kl,
    linear_decay,
)
from distill.losses.sentence_transformers import DistillLoss, token_keys

TEXTS = tiny.SENTENCES[:8]
BANK = 5


def draw(rows: int, width: int = tiny.WIDTH, seed: int = 3) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def spoilt(vectors: Tensor, value: float) -> Tensor:
    """With this value in one place."""
    vectors[3, 5] = value
    return vectors


def student_of(folder: Path | str) -> SentenceTransformer:
    """Without dropout: the same texts give the same vectors in training."""
    model = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def features_of(model: SentenceTransformer, texts: Sequence[str]) -> dict[str, Any]:
    return dict(model.preprocess(list(texts)))  # DDP finds no tensor in a BatchEncoding


def teacher_rows(**columns: Sequence[str]) -> Dataset:
    return Dataset.from_dict({**columns, "label": draw(len(TEXTS)).tolist()})


def vectors_of(model: SentenceTransformer, texts: Sequence[str]) -> Tensor:
    return model.encode(list(texts), convert_to_tensor=True)


class Recorder(TrainerCallback):
    """What a loss gives for the model as it stands before each step."""

    def __init__(self, measure: Callable[[SentenceTransformer], Tensor]) -> None:
        self.measure, self.expected = measure, list[float]()

    def on_step_begin(self, *_: Any, model: SentenceTransformer, **__: Any) -> None:
        self.expected.append(self.measure(model).item())


def trainer_of(
    loss: DistillLoss, dataset: Dataset, folder: Path, callbacks: Sequence[TrainerCallback] = (), **arguments: Any
) -> SentenceTransformerTrainer:
    settings = {
        "output_dir": str(folder / "trainer"),
        "per_device_train_batch_size": len(dataset),
        "max_steps": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    arguments = settings | arguments
    given = SentenceTransformerTrainingArguments(**arguments)
    model: Any = loss.model
    return SentenceTransformerTrainer(model, given, train_dataset=dataset, loss=loss, callbacks=list(callbacks))


def logged(trainer: SentenceTransformerTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


# In the trainer


def test_two_steps_with_a_sum_of_losses_and_a_bank(tiny_bert: Path, tmp_path: Path) -> None:
    student, bank, teacher = student_of(tiny_bert), draw(BANK, seed=4), draw(len(TEXTS))
    loss = WeightedSum({"twin": CosineDistance(), "bank": CrossKL(temperature=0.1)}, {"twin": 1.0, "bank": 0.5})
    recorder = Recorder(lambda model: loss(vectors_of(model, TEXTS), teacher, bank))
    before = [parameter.clone() for parameter in student.parameters()]
    trainer = trainer_of(DistillLoss(student, loss, bank=bank), teacher_rows(text=TEXTS), tmp_path, [recorder])
    trainer.train()
    assert logged(trainer) == pytest.approx(recorder.expected, abs=1e-4)
    assert recorder.expected[1] < recorder.expected[0]
    moved = [not torch.equal(one, two) for one, two in zip(before, student.parameters(), strict=True)]
    assert sum(moved) > len(moved) / 2


def test_two_columns_with_one_label_or_a_label_each(tiny_bert: Path, tmp_path: Path) -> None:
    others, teacher, other = TEXTS[::-1], draw(len(TEXTS)), draw(len(TEXTS), seed=5)
    for labels, second in ((teacher, teacher), (torch.stack([teacher, other], 1), other)):
        dataset = Dataset.from_dict({"one": TEXTS, "two": others, "label": labels.tolist()})

        def mean_of_columns(model: SentenceTransformer, second: Tensor = second) -> Tensor:
            first = cross_kl(vectors_of(model, TEXTS), teacher)
            return (first + cross_kl(vectors_of(model, others), second)) / 2

        recorder = Recorder(mean_of_columns)
        trainer = trainer_of(DistillLoss(student_of(tiny_bert), CrossKL()), dataset, tmp_path, [recorder])
        trainer.train()
        assert logged(trainer) == pytest.approx(recorder.expected, abs=1e-4)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("form", [None, "torch"])
def test_labels_as_datasets_gives_them(tiny_bert: Path, tmp_path: Path, dtype: str, form: str | None) -> None:
    if form == "torch" and Version(sentence_transformers.__version__) < Version("6.2"):
        pytest.skip("its collator takes no tensors as labels before 6.2")
    teacher = draw(len(TEXTS))
    columns = {"text": TEXTS, "label": teacher.numpy().astype(dtype).tolist()}
    features = Features({"text": Value("string"), "label": List(Value(dtype))})
    dataset = Dataset.from_dict(columns, features=features).with_format(form)
    recorder = Recorder(lambda model: cross_kl(vectors_of(model, TEXTS), teacher))
    trainer = trainer_of(DistillLoss(student_of(tiny_bert), CrossKL()), dataset, tmp_path, [recorder], max_steps=1)
    trainer.train()
    assert logged(trainer) == pytest.approx(recorder.expected, rel=1e-2 if dtype == "float16" else 1e-4)


def test_schedules_follow_the_trainer(tiny_bert: Path, tmp_path: Path) -> None:
    terms = WeightedSum(
        {"twin": CosineDistance(), "gram": GramKL()}, {"twin": 1.0, "gram": linear_decay(1.0, until=1.0)}
    )
    loss, weights = DistillLoss(student_of(tiny_bert), terms), list[float]()

    class Progress(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
            loss.set_progress(state.global_step / state.max_steps)
            weights.append(terms.weights()["gram"])

    trainer_of(loss, teacher_rows(text=TEXTS), tmp_path, [Progress()], max_steps=4).train()
    assert weights == [1.0, 0.75, 0.5, 0.25]


def test_the_model_card_names_the_loss(tiny_bert: Path, tmp_path: Path) -> None:
    loss = DistillLoss(student_of(tiny_bert), CrossKL(temperature=0.1), bank=draw(BANK))
    assert loss.get_config_dict() == {
        "loss": "CrossKL(temperature=0.1, teacher_temperature=None)",
        "bank": [BANK, tiny.WIDTH],
    }
    trainer_of(loss, teacher_rows(text=TEXTS), tmp_path, max_steps=1).save_model(str(tmp_path / "saved"))
    assert "CrossKL(temperature=0.1" in (tmp_path / "saved" / "README.md").read_text()


# Called directly


def test_the_bank_follows_the_loss_and_is_not_saved(tiny_bert: Path) -> None:
    loss = DistillLoss(student_of(tiny_bert), CrossKL(), bank=draw(BANK), bank_keys=torch.arange(BANK), keys=token_keys)
    assert not {"bank", "bank_keys"} & set(loss.state_dict())
    moved = loss.to("meta")
    assert moved.bank is not None
    assert moved.bank_keys is not None
    assert moved.bank.device.type == moved.bank_keys.device.type == "meta"


def test_labels_may_be_a_list_of_one_for_each_column(tiny_bert: Path) -> None:
    loss = DistillLoss(student_of(tiny_bert), CrossKL())
    columns = [features_of(loss.model, TEXTS), features_of(loss.model, TEXTS[::-1])]
    labels = torch.stack([draw(8), draw(8, seed=5)], 1)
    assert torch.equal(loss(columns, list(labels.unbind(1))), loss(columns, labels))


def test_keys_leave_equal_texts_out(tiny_bert: Path) -> None:
    student, teacher = student_of(tiny_bert), draw(8)
    texts = [*TEXTS[:7], TEXTS[0]]
    bank_texts = [TEXTS[1], *tiny.SENTENCES[8:12]]
    bank, bank_keys = draw(BANK, seed=4), token_keys(features_of(student, bank_texts))
    numbers = torch.tensor([0, 1, 2, 3, 4, 5, 6, 0])
    vectors = vectors_of(student, texts)
    for loss in (CrossKL(temperature=0.1), CrossContrastive(temperature=0.1)):
        expected = loss(vectors, teacher, bank, keys=numbers, bank_keys=torch.tensor([1, 8, 9, 10, 11]))
        adapter = DistillLoss(student, loss, bank=bank, bank_keys=bank_keys, keys=token_keys)
        assert adapter([features_of(student, texts)], teacher).item() == pytest.approx(expected.item(), rel=1e-5)
        assert loss(vectors, teacher, bank).item() != pytest.approx(expected.item(), rel=1e-3)


def test_a_key_is_that_of_the_tokens_wherever_the_padding_stands() -> None:
    ids = torch.tensor([[5, 6, 0, 0], [5, 6, 7, 0], [6, 5, 0, 0], [5, 6, 0, 0]])
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 0, 0]])
    right = token_keys({"input_ids": ids, "attention_mask": mask})
    padded_left = {"input_ids": torch.tensor([[0, 0, 5, 6]]), "attention_mask": torch.tensor([[0, 0, 1, 1]])}
    flat = token_keys({"input_ids": torch.tensor([5, 6, 5, 6, 7, 6, 5, 5, 6]), "offsets": torch.tensor([0, 2, 5, 7])})
    assert right[0] == right[3]
    assert len(set(right.tolist())) == 3
    assert torch.equal(flat, right)
    assert torch.equal(token_keys(padded_left), right[:1])
    assert torch.equal(token_keys({"input_ids": ids.int(), "attention_mask": mask.int()}), right)
    with pytest.raises(ValueError, match="input_ids beside an attention_mask or offsets, got"):
        token_keys({"input_ids": ids})


def test_a_static_model_has_keys_and_texts_without_tokens(tiny_bert: Path) -> None:
    static = SentenceTransformer(modules=[StaticEmbedding(tiny.wordpiece(), embedding_dim=tiny.WIDTH)], device="cpu")
    texts = ["", *TEXTS[:3], "", TEXTS[0]]
    keys = token_keys(features_of(static, texts)).tolist()
    assert keys[0] == keys[4]
    assert keys[1] == keys[5]
    assert len(set(keys)) == 4
    loss = DistillLoss(static, CrossKL(), keys=token_keys)([features_of(static, texts)], draw(6))
    assert loss.isfinite()


# Refused


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (None, ValueError, r"column named label\. Make them: dataset\.map"),
        (draw(8)[:, 0], ValueError, r"one column of \(8,\)\. Make them"),
        (torch.arange(8), TypeError, r"float tensors; got torch\.int64"),
        ([[0.5] * 32] * 8, TypeError, "float tensors; got list"),
        (draw(8).requires_grad_(), ValueError, r"require a gradient: the teacher has none"),
        (draw(8, width=24), ValueError, r"bank \(5, 32\) and labels \(8, 24\) of another width"),
        (draw(8)[:, None].repeat(1, 3, 1), ValueError, r"1 text columns and labels for 3 of them"),
        ([], ValueError, r"1 text columns and labels for 0 of them"),
        (spoilt(draw(8), math.nan), ValueError, r"1 rows are not finite.*dataset\.filter\("),
        (spoilt(draw(8), -math.inf)[:, None], ValueError, r"1 rows are not finite"),
    ],
)
def test_wrong_labels(tiny_bert: Path, unchecked: None, labels: Any, error: type[Exception], message: str) -> None:
    loss = DistillLoss(student_of(tiny_bert), CrossKL(), bank=draw(BANK))
    with pytest.raises(error, match=message):
        loss([features_of(loss.model, TEXTS)], labels)


def test_a_width_that_the_student_has_not(tiny_bert: Path, unchecked: None) -> None:
    student, teacher = student_of(tiny_bert), draw(8, width=24)
    with pytest.raises(ValueError, match=r"student \(8, 32\) and teacher \(8, 24\)"):
        DistillLoss(student, CrossKL())([features_of(student, TEXTS)], teacher)
    assert DistillLoss(student, GramKL())([features_of(student, TEXTS)], teacher).isfinite()


@pytest.mark.parametrize(
    ("loss", "options", "error", "message"),
    [
        (cross_kl, {}, TypeError, "a loss as a Module"),
        (CrossKL, {}, TypeError, "a loss as a Module"),
        (ScoreKL(), {}, ValueError, "ScoreKL compares scores"),
        (Matryoshka(WeightedSum({"a": CosineDistance(), "b": ScoreKL()}), (8,)), {}, ValueError, "ScoreKL compares"),
        (CosineDistance(), {"bank": draw(BANK)}, ValueError, "CosineDistance uses no bank and no keys, .* got bank"),
        (GramKL(), {"keys": token_keys}, ValueError, "GramKL uses no bank and no keys, .* got keys"),
        (CrossKL(), {"bank": draw(BANK)[0]}, ValueError, r"got torch\.float32 \(32,\)"),
        (CrossKL(), {"bank": torch.ones(5, 32).long()}, ValueError, "which is no float"),
        (CrossKL(), {"bank": draw(BANK) / 0}, ValueError, "finite teacher vectors"),
        (CrossKL(), {"bank": draw(BANK), "bank_keys": torch.arange(5)}, ValueError, "bank_keys without bank and keys"),
    ],
)
def test_wrong_losses_and_banks(
    tiny_bert: Path, unchecked: None, loss: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        DistillLoss(student_of(tiny_bert), loss, **options)


def test_distill_needs_no_sentence_transformers() -> None:
    program = """
import sys
sys.modules["sentence_transformers"] = None
import distill.losses
from distill.losses.sentence_transformers import DistillLoss
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


# In several processes


def adapter_of(folder: str) -> DistillLoss:
    terms = WeightedSum({"cross": CrossKL(temperature=0.1), "gram": GramKL(temperature=0.1)})
    student = student_of(folder)
    bank_keys = token_keys(features_of(student, tiny.SENTENCES[4:9]))
    return DistillLoss(student, terms, bank=draw(BANK, seed=4), bank_keys=bank_keys, keys=token_keys)


def two_columns() -> dict[str, Any]:
    """With a text that occurs twice, and a teacher vector for each text."""
    texts = [*TEXTS[:7], TEXTS[0]]
    return {"one": texts, "two": texts[::-1], "label": torch.stack([draw(8), draw(8, seed=5)], 1)}


def gradient(folder: str, local: bool = False) -> list[float]:
    """The value and the gradient of the whole batch, after DDP's mean. `local` leaves distill's exchange out: known wrong."""
    loss, data = adapter_of(folder), two_columns()
    mine = slice(distributed.share(8).start, distributed.share(8).stop)
    columns = [features_of(loss.model, data[name][mine]) for name in ("one", "two")]
    if distributed.world_size() > 1:  # as the trainer wraps it
        loss.model = DistributedDataParallel(loss.model, broadcast_buffers=False, find_unused_parameters=True)
    with pytest.MonkeyPatch.context() as patch:
        if local:
            patch.setattr(distributed, "world_size", lambda: 1)
        value = loss(columns, data["label"][mine])
    value.backward()
    flat = torch.cat([parameter.grad.flatten() for parameter in loss.parameters() if parameter.grad is not None])
    return [value.item(), *flat.tolist()]


def trained(folder: str, output: str) -> list[list[float]]:
    """The trainer's own steps, each of two global batches of 4 rows: its losses, and how far the weights went."""
    data = {name: column if name != "label" else column.tolist() for name, column in two_columns().items()}
    loss = adapter_of(folder)
    before = weights_of(loss.model)
    options = {"per_device_train_batch_size": 4 // distributed.world_size(), "gradient_accumulation_steps": 2}
    trainer = trainer_of(loss, Dataset.from_dict(data), Path(output), **options)
    trainer.train()
    return [logged(trainer), (weights_of(trainer.accelerator.unwrap_model(trainer.model)) - before).tolist()]


def weights_of(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten().double() for parameter in model.parameters()])


def with_other_columns(folder: str) -> str:
    """One process has two text columns and the other one, as a trainer of several datasets may draw them."""
    loss = adapter_of(folder)
    columns = [features_of(loss.model, TEXTS)] * (1 + distributed.rank())
    with pytest.raises(ValueError, match="split_batches") as error:
        loss(columns, draw(8))
    return str(error.value)


def in_each_process(folder: str, output: str) -> dict[str, Any]:
    found = {"gradient": gradient(folder), "local": gradient(folder, local=True), "trained": trained(folder, output)}
    return found | {"message": with_other_columns(folder)}


@pytest.fixture(scope="module")
def folder(tiny_model: Any) -> str:
    return str(tiny_model("bert", layers=1))


@pytest.fixture(scope="module")
def two(folder: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Once for all tests: two processes take their time to import everything."""
    place = tmp_path_factory.mktemp("two")
    found: list[dict[str, Any]] = processes.run(in_each_process, 2, place, folder=folder, output=str(place))
    return found


def test_two_processes_give_the_gradient_of_the_global_batch(folder: str, two: list[dict[str, Any]]) -> None:
    expected = torch.tensor(gradient(folder))
    scale = expected[1:].abs().max()
    for found in two:
        difference = (torch.tensor(found["gradient"]) - expected).abs()
        assert difference[0] <= 1e-5 * expected[0]
        assert difference[1:].max() <= 1e-5 * scale
        assert (torch.tensor(found["local"]) - expected)[1:].abs().max() > 1e-2 * scale


def test_the_trainer_in_two_processes_takes_the_steps_of_one(
    folder: str, two: list[dict[str, Any]], tmp_path: Path
) -> None:
    losses, way = trained(folder, str(tmp_path))
    for found in two:
        assert found["trained"][0] == pytest.approx(losses, rel=1e-4)
        difference = torch.tensor(found["trained"][1]) - torch.tensor(way)
        assert difference.abs().max() <= 1e-3 * torch.tensor(way).abs().max()


def test_processes_that_differ_do_not_wait_for_each_other(two: list[dict[str, Any]]) -> None:
    assert all("[[1, 32], [2, 32]]" in found["message"] for found in two)
