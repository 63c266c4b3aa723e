"""Encoder and head on labels: what pulls, what stays, what is chosen; two processes as one."""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import processes
import pytest
import runs
import tiny
import torch
import torch.nn.functional as F

from distill import distributed, students
from distill.config import TeacherConfig
from distill.data import Labelled
from distill.encoder import Encoder
from distill.errors import DataError, NumericsError, RecipeError
from distill.heads import CosineLinear
from distill.modules import Truncate
from distill.similarity import pairwise_cosine
from distill.training import NO_LABEL, LabelConfig, LabelledTexts, LabelTraining, herd

ROOT = Path(__file__).parents[1]
TEXTS = tiny.SENTENCES
LABELS = torch.arange(len(TEXTS)) % 3


@pytest.fixture(scope="module")
def encoder(tiny_bert: Path) -> Encoder:
    return students.static(Encoder.from_pretrained(tiny_bert), width=16)


def training(encoder: Encoder, *, classes: int = 3, **settings: float) -> LabelTraining:
    torch.manual_seed(0)
    config = LabelConfig(**({"batch_size": 5, "epochs": 20.0, "distillation": 0.0} | settings))
    return LabelTraining(copy.deepcopy(encoder), CosineLinear(encoder.width, classes, sigma_init=8.0), config)


def labelled(encoder: Encoder, labels: torch.Tensor = LABELS, *, pulled: bool = True) -> LabelledTexts:
    return LabelledTexts(encoder.tokenize(TEXTS).tokens, labels, encoder.encode(TEXTS) if pulled else None)


def test_a_proxy_is_no_class(encoder: Encoder) -> None:
    one = LabelTraining(encoder, CosineLinear(encoder.width, 2, nb_proxy=3), LabelConfig(distillation=0.0))
    with pytest.raises(ValueError, match="predict takes one column for each class"):
        one.predict(torch.randn(4, encoder.width))


def test_labels_are_learned_and_the_pull_keeps_the_vectors(encoder: Encoder) -> None:
    moved = {}
    for weight in (0.0, 100.0):
        one = training(encoder, distillation=weight)
        steps: list[dict] = []
        one.fit(labelled(encoder), log=steps.append)
        assert (one.predict(one.encoder.encode(TEXTS)) == LABELS).float().mean() > (0.9 if not weight else 0.5)
        assert steps[-1]["loss/labels"] < steps[0]["loss/labels"]
        assert [step["step"] for step in steps] == list(range(1, 61))
        moved[weight] = 1 - float(pairwise_cosine(one.encoder.encode(TEXTS), encoder.encode(TEXTS)).mean())
    assert moved[100.0] < 0.2 * moved[0.0]


def test_a_step_logs_the_loss_worked_out_by_hand_and_texts_without_a_label_have_no_say_in_it(encoder: Encoder) -> None:
    one, targets = training(encoder, distillation=2.0, batch_size=12, epochs=1.0), torch.randn(12, encoder.width)
    labels = torch.where(torch.arange(12) < 4, LABELS, NO_LABEL)
    vectors = encoder.encode(TEXTS)
    logits = 8.0 * F.normalize(vectors[:4]) @ F.normalize(one.head.weight.detach()).T
    by_hand = F.cross_entropy(logits, LABELS[:4])
    pull = (1 - F.cosine_similarity(vectors, targets)).mean()
    steps: list[dict] = []
    one.fit(LabelledTexts(encoder.tokenize(TEXTS).tokens, labels, targets), log=steps.append)
    assert steps[0]["loss/labels"] == pytest.approx(float(by_hand), abs=1e-5)
    assert steps[0]["loss/teacher"] == pytest.approx(float(pull), abs=1e-5)
    assert steps[0]["loss"] == pytest.approx(float(by_hand + 2 * pull), abs=1e-5)


def test_a_batch_without_a_label_trains_on_targets_alone(encoder: Encoder) -> None:
    one = training(encoder, distillation=1.0)
    before = one.head.weight.detach().clone()
    steps: list[dict] = []
    one.fit(labelled(encoder, torch.full((12,), NO_LABEL)), log=steps.append)
    assert {step["loss/labels"] for step in steps} == {0.0}
    assert torch.equal(one.head.weight, before)


def test_fixed_classes_stay_and_new_ones_keep_the_state_of_the_old(encoder: Encoder) -> None:
    one = training(encoder, classes=2, epochs=2.0)
    one.fit(labelled(encoder, LABELS % 2, pulled=False))
    old, moments = one.head.weight.detach().clone(), one.optimizer.state[one.head.weight]["exp_avg"].clone()
    assert moments.any()
    one.add_classes(1)
    assert torch.equal(one.optimizer.state[one.head.weight]["exp_avg"][:2], moments)
    one.fit(labelled(encoder, torch.full((12,), 2), pulled=False), fixed_classes=2)
    assert torch.equal(one.head.weight[:2], old)
    one.fit(labelled(encoder, torch.full((12,), 2), pulled=False))
    assert not torch.equal(one.head.weight[:2], old)  # as they would have gone


def test_a_fixed_class_keeps_each_of_its_proxies(encoder: Encoder) -> None:
    head = CosineLinear(encoder.width, 3, nb_proxy=2, to_reduce=True)
    one = LabelTraining(copy.deepcopy(encoder), head, LabelConfig(batch_size=5, epochs=1.0, distillation=0.0))
    old = head.weight.detach().clone()
    one.fit(labelled(encoder, pulled=False), fixed_classes=2)
    assert (head.weight == old).all(dim=1).tolist() == [True] * 4 + [False] * 2


def test_proxies_and_sigma_have_rates_of_their_own(encoder: Encoder) -> None:
    one = training(encoder, learning_rate=0.25, proxy_learning_rate=2.0, sigma_learning_rate=8.0)
    peaks = {value: group["peak"] for group in one.optimizer.param_groups for value in group["params"]}
    assert (peaks.pop(one.head.weight), peaks.pop(one.head.sigma)) == (2.0, 8.0)
    assert {*peaks.values()} == {0.25}


def test_matrices_and_proxies_decay_and_vectors_and_sigma_do_not(encoder: Encoder) -> None:
    one = training(encoder, weight_decay=0.3)
    decays = {value: group["weight_decay"] for group in one.optimizer.param_groups for value in group["params"]}
    parameters = [*one.encoder.parameters(), *one.head.parameters()]
    assert {value: 0.3 * (value.ndim > 1) for value in parameters if value.requires_grad} == decays
    assert decays[one.head.weight] == 0.3


def test_the_rate_rises_and_falls_anew_with_every_fit(encoder: Encoder) -> None:
    one = training(encoder, epochs=4.0, warmup_fraction=0.25)
    for _ in range(2):
        steps: list[dict] = []
        one.fit(labelled(encoder, pulled=False), log=steps.append)
        rates = [step["lr"] for step in steps]
        assert rates.index(max(rates)) == 3
        assert rates[0] < 0.2 * max(rates) > rates[-1]


def test_what_cannot_be_trained_is_named(encoder: Encoder) -> None:
    with pytest.raises(RecipeError, match=r"width 5, .* gives 32"):
        LabelTraining(encoder, CosineLinear(5, 3), LabelConfig())
    with pytest.raises(RecipeError, match="none were given"):
        training(encoder, distillation=1.0).fit(labelled(encoder, pulled=False))
    with pytest.raises(RecipeError, match=r"epochs is above 0, got 0\.0; distillation is 0 or more, got -1\.0"):
        LabelConfig(epochs=0.0, distillation=-1.0)
    tokens = encoder.tokenize(TEXTS).tokens
    with pytest.raises(DataError, match=r"\[12, 3\]"):
        LabelledTexts(tokens, LABELS[:3])
    with pytest.raises(DataError, match="target of text 7 is not finite"):
        LabelledTexts(tokens, LABELS, torch.ones(12, 4).index_fill(0, torch.tensor([7]), torch.nan))
    one = training(encoder)
    one.head.sigma.data.fill_(torch.nan)
    with pytest.raises(NumericsError, match=r"step 1: loss nan, gradient norm nan; stopped .* No rows"):
        one.fit(labelled(encoder, pulled=False))


@pytest.mark.parametrize("part", ["head", "encoder"])
def test_a_gradient_that_is_not_finite_stops_before_the_update(encoder: Encoder, part: str) -> None:
    one = training(encoder)
    next(getattr(one, part).parameters()).register_hook(lambda gradient: gradient / 0)
    before = copy.deepcopy([one.encoder.state_dict(), one.head.state_dict()])
    with pytest.raises(NumericsError, match=r"step 1: loss \d.*, gradient norm (nan|inf).* No rows have a vector"):
        one.fit(labelled(encoder, pulled=False))
    for old, new in zip(before, (one.encoder.state_dict(), one.head.state_dict()), strict=True):
        assert all(torch.equal(old[name], new[name]) for name in old)
    assert one.steps == 0


def test_texts_whose_vector_is_not_finite_are_quoted(encoder: Encoder) -> None:
    one = training(encoder, batch_size=12)
    texts = LabelledTexts.read(one.encoder, TEXTS, LABELS)
    alone = set(texts.tokens.rows(torch.tensor([5])).ids.tolist())
    alone -= set(texts.tokens.rows(torch.tensor([row for row in range(12) if row != 5])).ids.tolist())
    with torch.no_grad():
        one.encoder.backbone.table[min(alone)] = torch.inf
    with pytest.raises(NumericsError, match=r"1 rows have a vector that is not finite: 5 \('What is the capital"):
        one.fit(texts)


def test_training_reads_a_text_as_encoding_does(tiny_model: Callable[..., Path]) -> None:
    prompts = {"sort": "Please cancel: "}
    asked = Encoder.from_pretrained(tiny_model("bert", layers=2, prompts=prompts, default_prompt_name="sort"))
    texts = LabelledTexts.read(asked, TEXTS, LABELS, asked.encode(TEXTS))
    with torch.no_grad():
        torch.testing.assert_close(asked(texts.tokens), texts.targets)
    assert len(texts.tokens.ids) > len(asked.tokenize(TEXTS).tokens.ids)


@pytest.mark.parametrize(
    "path", [*ROOT.glob("recipes/*.py"), *ROOT.glob("notebooks/*.ipynb")], ids=lambda path: path.stem
)
def test_recipes_and_notebooks_leave_the_prompt_to_distill(path: Path) -> None:
    assert ".tokenize(" not in path.read_text(encoding="utf-8")


def test_a_recipe_orders_its_texts_by_the_seed_of_labels(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def losses(**labels: int) -> list[float]:
        config = LabelConfig(batch_size=4, epochs=1.0, **labels)
        output = tmp_path / str(labels)
        recipe = classify.Recipe(
            train_data="",
            test_data="",
            train_encoder=True,
            teacher=teacher,
            labels=config,
            store=tmp_path / "store",
            output=output,
            seed=3,
        )
        torch.manual_seed(0)
        classify.together(recipe, data, Encoder.from_pretrained(tiny_bert), list(range(12)))
        return [json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text().splitlines()]

    classify, teacher = runs.recipe_module("classify"), TeacherConfig(name=str(tiny_bert))
    data = Labelled(texts=TEXTS, labels=LABELS.tolist(), names=["a", "b", "c"])
    data = replace(data, test=data)
    assert losses(seed=3) == losses() != losses(seed=7)

    class Noted(LabelTraining):
        def __init__(self, encoder: Encoder, head: CosineLinear, config: LabelConfig):
            super().__init__(encoder, head, config)
            seeds.append(config.seed)

    incremental, seeds = runs.recipe_module("incremental"), []
    monkeypatch.setattr(incremental, "LabelTraining", Noted)
    for labels in (LabelConfig(epochs=0.1), LabelConfig(epochs=0.1, seed=7)):
        recipe = incremental.Recipe(train_data="", encoder="", labels=labels)
        incremental.learn(recipe, "fine-tuning", 3, Encoder.from_pretrained(tiny_bert), [data])
    assert seeds == [3, 7]


def test_an_encoder_that_is_not_as_wide_as_its_teacher_is_told_before_anything_is_embedded(
    tiny_bert: Path, tmp_path: Path
) -> None:
    classify, store = runs.recipe_module("classify"), tmp_path / "store"
    recipe = classify.Recipe(
        train_data="", test_data="", train_encoder=True, teacher=TeacherConfig(name=str(tiny_bert)), store=store
    )
    data = Labelled(texts=TEXTS, labels=LABELS.tolist(), names=["a", "b", "c"])
    narrow = Encoder.from_pretrained(tiny_bert)
    narrow.head.append(Truncate(16))
    with pytest.raises(RecipeError, match=r"vectors of 16 numbers and its teacher .* of 32;"):
        classify.together(recipe, replace(data, test=data), narrow, list(range(12)))
    assert not store.exists()


def test_herding_keeps_the_mean_direction_of_each_class() -> None:
    vectors, labels = F.normalize(torch.randn(40, 6) + 1), torch.arange(40) % 2
    chosen = herd(vectors, labels, 4)
    assert labels[chosen].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    for label in (0, 1):
        points = vectors[labels == label]
        greedy: list[int] = []
        for _ in range(4):  # every choice, tried
            rest = [row for row in range(len(points)) if row not in greedy]
            greedy.append(min(rest, key=lambda row: (points.mean(0) - points[[*greedy, row]].mean(0)).norm().item()))
        own = torch.nonzero(labels == label).flatten()
        assert own[torch.tensor(greedy)].tolist() == chosen[labels[chosen] == label].tolist()
    assert herd(vectors, labels, 0).tolist() == []
    assert sorted(herd(vectors[:3], labels[:3], 9).tolist()) == [0, 1, 2]


def trained(model: str, labels: list[int], distillation: float) -> dict[str, list[float]]:
    """In one of some processes: the losses of a run, and the weights it ends with, of which each process has a copy."""
    distributed.device()
    start = students.static(Encoder.from_pretrained(model), width=16).double()  # AdamW makes steps of roundings
    one = training(start, distillation=distillation, epochs=4.0)
    one.head.double()
    steps: list[dict] = []
    targets = start.encode(TEXTS).double()
    one.fit(LabelledTexts(start.tokenize(TEXTS).tokens, torch.tensor(labels), targets), log=steps.append)
    weights = torch.cat([p.detach().flatten() for p in (*one.encoder.parameters(), *one.head.parameters())])
    return {"losses": [step["loss"] for step in steps], "weights": weights.tolist()}


FEW = [0, 1] + 10 * [NO_LABEL]


@pytest.mark.parametrize(
    ("labels", "distillation"),
    [(torch.where(torch.arange(12) % 4 > 0, LABELS, NO_LABEL).tolist(), 3.0), (FEW, 3.0), (FEW, 0.0)],
    ids=["most have a label", "batches without a label", "batches without anything"],
)
def test_two_processes_train_as_one(tiny_bert: Path, tmp_path: Path, labels: list[int], distillation: float) -> None:
    settings = {"model": str(tiny_bert), "labels": labels, "distillation": distillation}
    two = processes.run(trained, 2, tmp_path, **settings)
    assert two[0] == two[1]
    one = trained(**settings)
    assert two[0]["losses"] == pytest.approx(one["losses"], rel=1e-6)
    assert two[0]["weights"] == pytest.approx(one["weights"], abs=1e-9)


def heads_drawn_apart(model: str) -> dict[str, list[float]]:
    """In one of some processes, each with random numbers of its own, as after a training: the head and what it becomes."""
    distributed.device()
    start = students.static(Encoder.from_pretrained(model), width=16)
    torch.manual_seed(distributed.rank())
    one = LabelTraining(start, CosineLinear(start.width, 2), LabelConfig(distillation=0.0))
    before = one.head.weight.flatten().tolist()
    one.add_classes(1)
    return {"before": before, "after": one.head.weight.flatten().tolist()}


def test_processes_share_the_main_ones_head(tiny_bert: Path, tmp_path: Path) -> None:
    one, two = processes.run(heads_drawn_apart, 2, tmp_path, model=str(tiny_bert))
    assert one == two


# What follows needs a GPU: pytest -m gpu.


@pytest.mark.gpu
@pytest.mark.parametrize("without_label", [0, 4])
def test_the_host_waits_for_the_device_once_a_step(without_label: int, encoder: Encoder) -> None:
    one = training(copy.deepcopy(encoder).to("cuda"), distillation=1.0, batch_size=12)
    texts = labelled(encoder, torch.where(torch.arange(12) < without_label, NO_LABEL, LABELS))

    def waits(epochs: float) -> int:
        one.config = replace(one.config, epochs=epochs)
        return runs.waits_for_the_device(lambda: one.fit(texts))

    waits(5.0)  # what is tried once
    few, many = waits(5.0), waits(15.0)
    assert many - few == 10
