"""CosineLinear against the formula its users know, and what they stumble over; Projection against least squares."""

import gc
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from oracles import cosine_linear
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from distill.heads import CosineLinear, Projection, classification_loss, parameter_groups, reduce_proxies
from distill.similarity import pairwise_cosine


@pytest.mark.parametrize(("nb_proxy", "to_reduce"), [(1, False), (1, True), (10, True)])
@pytest.mark.parametrize("sigma", [True, False])
def test_cosine_linear_equals_the_original_formula(nb_proxy: int, to_reduce: bool, sigma: bool) -> None:
    head = CosineLinear(16, 5, nb_proxy, to_reduce, sigma, sigma_init=3.0).double()
    x = torch.randn(7, 16, dtype=torch.float64)
    expected = cosine_linear(x, head.weight, nb_proxy, 3.0 if sigma else 1.0)
    torch.testing.assert_close(head(x)["logits"], torch.from_numpy(expected), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        head.float()(x.float())["logits"].double(), torch.from_numpy(expected), rtol=1e-5, atol=1e-5
    )


def test_unreduced_proxies_are_class_major_and_reduce_to_the_same_logits() -> None:
    head, reduced = CosineLinear(16, 5, 3), CosineLinear(16, 5, 3, to_reduce=True, gamma=10.0)
    reduced.load_state_dict(head.state_dict())
    x = torch.randn(4, 16)
    output = head(x)
    assert output["logits"].shape == (4, 15)
    assert output["nb_proxy"] == 3
    torch.testing.assert_close(output["logits"], F.normalize(x) @ F.normalize(head.weight).T)
    torch.testing.assert_close(reduce_proxies(output["logits"], 3, gamma=10.0), reduced(x)["logits"])
    assert set(reduced(x)) == set(CosineLinear(16, 5)(x)) == {"logits"}


def test_gamma_as_documented() -> None:
    scores = torch.tensor([[0.9] + [0.2] * 9])
    assert float(reduce_proxies(scores, 10)) == pytest.approx(0.328, abs=5e-4)
    assert float(reduce_proxies(scores, 10, gamma=10.0)) == pytest.approx(0.894, abs=5e-4)


def test_sigma_one_cannot_fit_a_hundred_classes_and_sigma_init_can() -> None:
    best = torch.full((1, 100), -1.0)
    best[0, 0] = 1.0
    target = torch.tensor([0])
    assert float(F.cross_entropy(best, target)) == pytest.approx(2.667, abs=5e-4)
    assert float(F.cross_entropy(16 * best, target)) < 1e-6
    assert CosineLinear(4, 100, sigma_init=16.0).sigma.item() == 16


def test_rows_of_any_leading_shape_zero_rows_and_16_bits() -> None:
    head = CosineLinear(8, 5)
    x = torch.randn(2, 3, 8)
    x[0, 0] = 0
    logits = head(x)["logits"]
    assert logits.shape == (2, 3, 5)
    assert not logits[0, 0].any()
    torch.testing.assert_close(logits[1], head(x[1])["logits"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert head(x.bfloat16())["logits"].dtype == torch.float32
        assert torch.equal(head(x)["logits"], logits)
    logits.sum().backward()
    assert head.weight.grad is not None
    assert head.weight.grad.isfinite().all()


def test_classification_loss_is_cross_entropy_and_refuses_proxies() -> None:
    x, targets = torch.randn(6, 8), torch.randint(5, (6,))
    head = CosineLinear(8, 5, 4, to_reduce=True)
    torch.testing.assert_close(classification_loss(head(x), targets), F.cross_entropy(head(x)["logits"], targets))
    with pytest.raises(ValueError, match=r"classification_loss .*\(6, 20\) with 4 proxies.*to_reduce=True"):
        classification_loss(CosineLinear(8, 5, 4)(x), targets)
    with pytest.raises(ValueError, match=r"\(6, 5\) and targets \(3,\)"):
        classification_loss(head(x), targets[:3])


def test_the_loss_of_16_bit_logits_is_computed_in_float32() -> None:
    logits, targets = torch.randn(5, 3).bfloat16(), torch.tensor([0, 1, 2, 0, 1])
    assert torch.equal(classification_loss({"logits": logits}, targets), F.cross_entropy(logits.float(), targets))


@pytest.mark.usefixtures("unchecked")
def test_bare_logits_and_wrong_widths_are_refused() -> None:
    with pytest.raises(TypeError, match="logits"):
        classification_loss(torch.randn(6, 5), torch.zeros(6, dtype=torch.long))
    with pytest.raises(ValueError, match=r"width 8, got \(2, 7\)"):
        CosineLinear(8, 5)(torch.randn(2, 7))
    with pytest.raises(ValueError, match="3 columns"):
        reduce_proxies(torch.randn(2, 7), 3)
    with pytest.raises(ValueError, match="at least 1"):
        CosineLinear(8, 0)


def test_imprint_sets_the_mean_direction_and_leaves_other_classes() -> None:
    head = CosineLinear(8, 4)
    before = head.weight.detach().clone()
    embeddings, labels = torch.randn(20, 8), torch.arange(20) % 3
    embeddings[labels == 2] = 0
    head.imprint(embeddings, labels)
    for label in (0, 1):
        mean = F.normalize(embeddings[labels == label]).mean(0)
        torch.testing.assert_close(head.weight[label].detach(), F.normalize(mean, dim=0))
    assert torch.equal(head.weight[2:], before[2:])
    with pytest.raises(ValueError, match=r"0\.\.3 .*add_classes"):
        head.imprint(embeddings, labels + 2)


@pytest.mark.usefixtures("unchecked")
def test_imprint_refuses_what_has_no_direction_or_no_class() -> None:
    head, embeddings, labels = CosineLinear(8, 4), torch.randn(6, 8), torch.arange(6) % 3
    before = head.weight.detach().clone()
    for wrong in (embeddings * torch.nan, embeddings / 0, embeddings[:, :7], embeddings[0]):
        with pytest.raises(ValueError, match="imprint takes finite embeddings of width 8"):
            head.imprint(wrong, labels)
    with pytest.raises(TypeError, match=r"numbers of classes, got torch\.float32"):
        head.imprint(embeddings, labels.float())
    with pytest.raises(TypeError, match=r"labels as a torch\.Tensor, got builtins\.list"):
        head.imprint(embeddings, labels.tolist())
    with pytest.raises(TypeError, match=r"embeddings as a torch\.Tensor, got numpy"):
        head.imprint(embeddings.numpy(), labels)
    assert torch.equal(head.weight, before)


def test_imprint_finds_the_clusters_of_a_class_and_is_deterministic() -> None:
    centres = torch.eye(6)
    labels = torch.arange(6).repeat(10) // 3  # class 0 lives around axes 0..2, class 1 around 3..5
    embeddings = centres.repeat(10, 1) + 0.05 * torch.randn(60, 6)
    head, again = CosineLinear(6, 2, 3, to_reduce=True, gamma=10.0), CosineLinear(6, 2, 3)
    head.imprint(embeddings, labels)
    again.imprint(embeddings, labels)
    assert torch.equal(head.weight, again.weight)
    assert sorted(head.weight[:3].argmax(-1).tolist()) == [0, 1, 2]
    assert sorted(head.weight[3:].argmax(-1).tolist()) == [3, 4, 5]
    assert (head.weight.amax(-1) > 0.99).all()
    assert torch.equal(head(embeddings)["logits"].argmax(-1), labels)
    again.imprint(embeddings[:2], torch.zeros(2, dtype=torch.long))  # fewer rows than proxies
    assert again.weight.isfinite().all()


OPTIMIZERS = [
    lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True),
    lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    lambda p: torch.optim.SGD(p, lr=0.1),
    lambda p: torch.optim.Adafactor(p, lr=0.1),
]


def test_a_proxy_without_an_embedding_of_its_own_is_that_of_the_others() -> None:
    head, direction = CosineLinear(4, 2, nb_proxy=3), torch.tensor([0.6, 0.8, 0.0, 0.0])
    head.imprint(direction.expand(5, 4), torch.zeros(5, dtype=torch.long))
    torch.testing.assert_close(head.weight[:3], direction.expand(3, 4))


@pytest.mark.parametrize("build", OPTIMIZERS)
def test_add_classes_keeps_weights_and_optimizer_state_and_then_trains(build) -> None:
    head = CosineLinear(8, 3, 2, to_reduce=True)
    optimizer = build(head.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        classification_loss(head(torch.randn(16, 8)), torch.randint(3, (16,))).backward()
        optimizer.step()
    old, state = head.weight.detach().clone(), dict(optimizer.state[head.weight])
    head.add_classes(2, optimizer)
    assert torch.equal(head.weight[:6], old)
    assert (head.weight.shape, head.out_features, head.weight.grad) == ((10, 8), 5, None)
    assert head.weight[6:].any()
    assert head.weight[6:].abs().max() <= 1 / math.sqrt(8)
    for name, value in optimizer.state[head.weight].items():
        if torch.is_tensor(value) and value.ndim == 2:
            assert torch.equal(value[:6], state[name])
            assert not value[6:].any()
        else:
            assert value == state[name]
    classification_loss(head(torch.randn(16, 8)), torch.full((16,), 4)).backward()
    before = head.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(head.weight[8:], before[8:])


def test_a_head_of_one_class_grows_in_adafactor() -> None:
    head = CosineLinear(8, 1)
    optimizer = torch.optim.Adafactor(head.parameters(), lr=0.1)
    for classes in (1, 2, 4):
        head.add_classes(classes - head.out_features, optimizer) if classes > 1 else None
        optimizer.zero_grad()
        classification_loss(head(torch.randn(16, 8)), torch.randint(classes, (16,))).backward()
        optimizer.step()
    assert head.weight.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_loop_that_still_holds_the_loss_of_the_step_before_goes_on(dtype: torch.dtype) -> None:
    head = CosineLinear(8, 3).to(dtype)
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.1)
    for classes in (3, 5, 9):
        if classes > 3:
            head.add_classes(classes - head.out_features, optimizer)
        for _ in range(2):
            loss = classification_loss(head(torch.randn(16, 8, dtype=dtype)), torch.randint(classes, (16,)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert loss.isfinite()
        assert (head.weight.dtype, head.weight.grad.shape) == (dtype, (classes, 8))


def grown_in_ddp() -> list[Any]:
    """In one of two processes: what add_classes says to a head in DDP, and whether it then is exchanged in a new one."""
    head = CosineLinear(8, 3)
    draw = torch.Generator().manual_seed(dist.get_rank())
    wrapped = DistributedDataParallel(head)
    classification_loss(wrapped(torch.randn(4, 8, generator=draw)), torch.randint(3, (4,))).backward()
    before = head.weight.detach().clone()
    try:
        head.add_classes(2)
        message = "nothing"
    except ValueError as error:
        message = str(error)
    unchanged = torch.equal(head.weight, before) and head.out_features == 3
    del wrapped
    gc.collect()
    torch.manual_seed(5)
    head.add_classes(2)
    wrapped = DistributedDataParallel(head)
    classification_loss(wrapped(torch.randn(4, 8, generator=draw)), torch.randint(5, (4,))).backward()
    return [message, unchanged, head.weight.grad.tolist()]


def test_a_head_in_ddp_grows_only_outside_of_it(tmp_path: Path) -> None:
    one, two = processes.run(grown_in_ddp, 2, tmp_path)
    assert one == two
    assert "Drop both before (del loss, ddp)" in one[0]
    assert one[1]
    assert len(one[2]) == 5


def test_add_classes_refuses_another_optimizer_and_nothing_to_add() -> None:
    head = CosineLinear(8, 3)
    with pytest.raises(ValueError, match="does not hold"):
        head.add_classes(1, torch.optim.SGD(CosineLinear(8, 3).parameters(), lr=0.1))
    with pytest.raises(ValueError, match="at least one class"):
        head.add_classes(0)
    assert head.out_features == 3


@pytest.mark.parametrize(
    "wrap", [torch.nn.utils.parametrizations.weight_norm, torch.nn.utils.parametrizations.orthogonal]
)
def test_a_weight_that_is_computed_is_not_written_into(wrap: Callable[[nn.Module], nn.Module]) -> None:
    head = wrap(CosineLinear(8, 3))
    with pytest.raises(ValueError, match="add_classes changes the parameter weight"):
        head.add_classes(1)
    with pytest.raises(ValueError, match="imprint changes the parameter weight"):
        head.imprint(torch.randn(3, 8), torch.arange(3))
    assert head.out_features == 3


def test_add_classes_refuses_the_history_of_lbfgs() -> None:
    head = CosineLinear(8, 3)
    optimizer = torch.optim.LBFGS(head.parameters())

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = classification_loss(head(torch.eye(8)[:3]), torch.arange(head.out_features)[:3])
        loss.backward()
        return loss

    head.add_classes(1, optimizer)  # it has none yet
    optimizer.step(closure)
    with pytest.raises(ValueError, match="what LBFGS remembers"):
        head.add_classes(1, optimizer)
    assert head.weight.shape == (4, 8)


def test_parameter_groups_keep_sigma_and_biases_out_of_decay() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), CosineLinear(8, 3))
    model[1].bias.requires_grad_(False)
    decayed, plain, sigma = parameter_groups(model, lr=1e-3, sigma_lr=1e-1, weight_decay=0.1)
    assert [id(p) for p in decayed["params"]] == [id(model[0].weight), id(model[2].weight)]
    assert [id(p) for p in plain["params"]] == [id(model[0].bias), id(model[1].weight)]
    assert [id(p) for p in sigma["params"]] == [id(model[2].sigma)]
    assert [g["weight_decay"] for g in (decayed, plain, sigma)] == [0.1, 0, 0]
    assert [g["lr"] for g in (decayed, plain, sigma)] == [1e-3, 1e-3, 1e-1]
    torch.optim.AdamW([decayed, plain, sigma])
    assert len(parameter_groups(nn.Linear(2, 2, bias=False), lr=1.0, sigma_lr=1.0, weight_decay=0.1)) == 1


def pairs(n: int, d: int = 6, e: int = 9, noise: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    student = torch.randn(n, d)
    return student, student @ torch.randn(d, e) + noise * torch.randn(n, e)


@pytest.mark.parametrize("ridge", [0.0, 1e-3, 1.0])
def test_ridge_solves_the_regularised_least_squares(ridge: float) -> None:
    student, teacher = pairs(50, noise=0.3)
    s, t = student.double(), teacher.double()
    strength = (ridge * s.square().sum() / 6).sqrt() * torch.eye(6)
    stacked = torch.linalg.lstsq(torch.cat([s, strength]), torch.cat([t, torch.zeros(6, 9)])).solution
    projection = Projection.ridge(student, teacher, ridge=ridge)
    torch.testing.assert_close(projection.weight, stacked.T.float(), rtol=1e-5, atol=1e-6)
    assert (projection.in_features, projection.out_features, projection.bias) == (6, 9, None)
    assert projection.weight.requires_grad


def test_ridge_finds_a_linear_map_and_beats_a_random_one() -> None:
    student, teacher = pairs(200)
    assert pairwise_cosine(Projection.ridge(student, teacher)(student), teacher).mean() > 0.999999
    assert pairwise_cosine(Projection(6, 9)(student), teacher).mean() < 0.9


def test_the_chosen_ridge_is_the_best_on_every_tenth_row() -> None:
    held, grid, choices = torch.arange(40) % 10 == 9, [10.0**e for e in range(-7, 2)], set()
    for _ in range(8):
        student, teacher = pairs(40, d=30, noise=6.0)  # 36 rows fit 30 directions: no ridge overfits badly
        fits = [Projection.ridge(student[~held], teacher[~held], ridge=ridge) for ridge in grid]
        quality = [pairwise_cosine(fit(student[held]), teacher[held]).mean().item() for fit in fits]
        best = grid[quality.index(max(quality))]
        expected = Projection.ridge(student, teacher, ridge=best)
        torch.testing.assert_close(Projection.ridge(student, teacher).weight, expected.weight)
        choices.add(best)
    assert len(choices) > 1


@pytest.mark.parametrize("ridge", [None, 1e-3])
def test_a_stream_of_batches_equals_the_whole(ridge: float | None) -> None:
    student, teacher = pairs(103, noise=0.5)
    whole = Projection.ridge(student, teacher, ridge=ridge)
    parts = zip(student.split(7), teacher.split(7), strict=True)
    torch.testing.assert_close(Projection.fit_batches(parts, ridge=ridge).weight, whole.weight)


def test_ridge_leaves_directions_that_no_row_has_at_zero() -> None:
    student, teacher = pairs(50)
    student[:, 2] = 0
    weight = Projection.ridge(student, teacher, ridge=0.0).weight
    assert weight.isfinite().all()
    assert weight[:, 2].abs().max() < 1e-6


@pytest.mark.usefixtures("unchecked")
def test_ridge_refuses_what_it_cannot_solve() -> None:
    student, teacher = pairs(9)
    with pytest.raises(ValueError, match="got 9 rows"):
        Projection.ridge(student, teacher)
    with pytest.raises(ValueError, match=r"\(9, 6\) and teacher \(8, 9\)"):
        Projection.ridge(student, teacher[:8])
    with pytest.raises(ValueError, match="NaN"):
        Projection.ridge(student * torch.nan, teacher, ridge=0.1)
    student, teacher = pairs(30)
    for row in (8, 9, 19):  # every tenth is held out
        for side in (0, 1):
            sides = student.clone(), teacher.clone()
            sides[side][row, 0] = torch.inf if row == 19 else torch.nan
            with pytest.raises(ValueError, match="without NaN or infinity, got 30 rows"):
                Projection.ridge(*sides)
    with pytest.raises(ValueError, match=r"at least 0, got -1\.0"):
        Projection.ridge(student, teacher, ridge=-1.0)
    with pytest.raises(ValueError, match="got 0 rows"):
        Projection.fit_batches([], ridge=0.1)
