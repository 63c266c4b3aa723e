"""Which parameter learns at which rate, decays or not; and flags for parts that a student does not have."""

from pathlib import Path
from typing import Any

import pytest
import runs
import torch

from distill.encoder import Encoder
from distill.errors import RecipeError
from distill.students import freeze_token_table
from distill.training import TrainConfig, optimizer

RATE = 1e-2


def made(student: Encoder, **options: Any) -> tuple[torch.optim.AdamW, dict[str, dict[str, Any]]]:
    """The optimizer, and the group of each parameter by its name."""
    adamw = optimizer.adamw(student, TrainConfig(learning_rate=RATE, **options))
    names = {id(parameter): name for name, parameter in student.named_parameters()}
    return adamw, {names[id(p)]: group for group in adamw.param_groups for p in group["params"]}


def rates(student: Encoder, **options: Any) -> dict[str, float]:
    return {name: group["lr"] / RATE for name, group in made(student, **options)[1].items()}


@pytest.fixture
def static(tiny_bert: Path) -> Encoder:
    return runs.student("static", runs.teacher(tiny_bert))


@pytest.fixture
def layered(tiny_bert: Path) -> Encoder:
    return runs.student("layers", runs.teacher(tiny_bert))


def test_without_flags_all_learn_at_one_rate_in_two_groups(static: Encoder, layered: Encoder) -> None:
    for student in (static, layered):
        adamw, groups = made(student, weight_decay=0.1)
        assert [group["lr"] for group in adamw.param_groups] == [RATE, RATE]
        trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
        assert groups.keys() == trained.keys()
        for name, group in groups.items():
            assert group["weight_decay"] == (0.1 if trained[name].ndim > 1 else 0.0), name


def test_norms_biases_and_token_weights_do_not_decay(static: Encoder, layered: Encoder) -> None:
    free = {name for student in (static, layered) for name, g in made(student)[1].items() if not g["weight_decay"]}
    assert "backbone.weights" in free
    assert any(name.endswith("LayerNorm.weight") for name in free)
    assert all(name.endswith(("bias", "LayerNorm.weight", "backbone.weights")) for name in free)


def test_the_parts_of_a_static_student_have_rates_of_their_own(static: Encoder) -> None:
    assert rates(static, projection_rate=0.25, token_weight_rate=8.0, table_rate=2.0) == pytest.approx(
        {"backbone.table": 2.0, "backbone.weights": 8.0, "head.0.linear.weight": 0.25}
    )


def test_the_projection_of_a_layered_student_alone_has_its_rate(layered: Encoder) -> None:
    found = rates(layered, projection_rate=0.25)
    assert {name for name, rate in found.items() if rate == pytest.approx(0.25)} == {"head.0.linear.weight"}
    assert sum(rate == 1 for rate in found.values()) == len(found) - 1


def test_layers_learn_slower_the_lower_they_are_and_embeddings_slowest(layered: Encoder) -> None:
    found = rates(layered, layer_decay=0.5, table_rate=3.0)
    for name, rate in found.items():
        expected = {"embeddings": 0.25, "encoder.layer.0.": 0.5}
        share = next((share for part, share in expected.items() if part in name), 1.0)
        assert rate == pytest.approx(share * (3.0 if "word_embeddings" in name else 1.0)), name
    assert len({round(rate, 6) for rate in found.values()}) == 4


def test_every_group_follows_the_schedule_from_its_own_peak(static: Encoder) -> None:
    config = TrainConfig(learning_rate=RATE, projection_rate=0.5)
    adamw = optimizer.adamw(static, config)
    share = optimizer.rate_of(adamw, config, 10)
    for step in (0, 5, 9):
        optimizer.set_rate(adamw, share(step + 0.5))
        found = sorted({group["lr"] for group in adamw.param_groups})
        assert found == pytest.approx([0.5 * RATE * share(step + 0.5), RATE * share(step + 0.5)])


@pytest.mark.parametrize(
    ("kind", "options", "flag"),
    [
        ("static", {"layer_decay": 0.9}, "--train.layer-decay"),
        ("layers", {"token_weight_rate": 2.0}, "--train.token-weight-rate"),
        ("frozen", {"table_rate": 2.0}, "--train.table-rate"),
        ("bare", {"projection_rate": 2.0}, "--train.projection-rate"),
    ],
)
def test_a_rate_for_a_part_that_is_not_trained_is_refused(
    tiny_bert: Path, kind: str, options: dict[str, float], flag: str
) -> None:
    teacher = runs.teacher(tiny_bert)
    student = teacher if kind == "bare" else runs.student("static" if kind == "static" else "layers", teacher)
    if kind == "frozen":
        freeze_token_table(student)
    with pytest.raises(RecipeError, match=f"{flag} is for a part that .* does not have, or does not train"):
        made(student, **options)
    made(student)


def test_the_anchor_is_of_static_tables_alone(static: Encoder, layered: Encoder) -> None:
    ids = torch.tensor([1, 2])
    anchor = optimizer.anchor_of(static, ids, TrainConfig(start_decay=2.0))
    assert anchor is not None
    assert torch.equal(anchor.start, static.backbone.table)
    assert optimizer.anchor_of(static, ids, TrainConfig()) is None
    with pytest.raises(RecipeError, match=r"--train.start-decay pulls the rows of a static table"):
        optimizer.anchor_of(layered, ids, TrainConfig(start_decay=2.0))
