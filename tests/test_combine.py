"""Sums of losses against their terms, and one loss at several widths."""

import pickle

import oracles
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distill import losses
from distill.losses import CosineDistance, GramMSE, Matryoshka, WeightedSum, constant, cross_kl, linear_decay


def terms() -> dict[str, torch.nn.Module]:
    return {"near": losses.CosineDistance(), "far": losses.CrossKL(temperature=0.1)}


def test_a_weighted_sum_is_its_terms_and_bank_reaches_only_cross_terms() -> None:
    student, teacher, bank = (torch.randn(5, 8) for _ in range(3))
    keys, bank_keys = torch.arange(5), torch.arange(3, 8)
    total = WeightedSum(terms(), {"near": 2.0, "far": 0.5})
    value = total(student, teacher, bank, keys=keys, bank_keys=bank_keys)
    far = cross_kl(student, teacher, bank, keys=keys, bank_keys=bank_keys, temperature=0.1)
    torch.testing.assert_close(value, 2 * losses.cosine_distance(student, teacher) + 0.5 * far)
    torch.testing.assert_close(total.parts()["far"], far)
    assert total.uses_bank
    assert not WeightedSum({"near": losses.CosineDistance()}).uses_bank
    assert "near=2" in repr(total)


def test_parts_hold_no_graph() -> None:
    total = WeightedSum(terms())
    total(torch.randn(5, 8, requires_grad=True), torch.randn(5, 8)).backward()
    assert all(not part.requires_grad for part in total.parts().values())


def test_a_schedule_follows_progress_and_a_weight_of_zero_is_not_computed() -> None:
    total = WeightedSum(terms(), {"near": linear_decay(1.0, until=0.5), "far": constant(1.0)})
    seen = {}
    for progress in (0.0, 0.25, 0.5, 1.0):
        total.set_progress(progress)
        seen[progress] = total.weights()["near"]
        total(torch.randn(5, 8), torch.randn(5, 8))
        assert set(total.parts()) == ({"near", "far"} if seen[progress] else {"far"})
    assert seen == {0.0: 1.0, 0.25: 0.5, 0.5: 0.0, 1.0: 0.0}


def test_sums_nest_and_share_progress() -> None:
    inner = WeightedSum(terms(), {"near": linear_decay(1.0), "far": 1.0})
    outer = WeightedSum({"inner": inner})
    outer.set_progress(0.5)
    assert (outer.progress, inner.progress) == (0.5, 0.5)
    assert outer.uses_bank


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"near": 1.0}, "weight for every term"),
        ({"near": 1.0, "far": 1.0, "further": 1.0}, "weight for every term"),
        ({"near": 0.0, "far": 0.0}, "at 0.00"),
        ({"near": linear_decay(1.0, until=0.5), "far": 0.0}, "at 0.50"),
        ({"near": float("nan"), "far": 1.0}, "finite"),
    ],
)
def test_weights_that_cannot_train_are_refused_before_the_run(weights: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WeightedSum(terms(), weights)


@pytest.mark.parametrize("name", ["keys", "forward", "a.b", ""])
def test_a_name_that_torch_refuses_is_refused_as_one(name: str) -> None:
    with pytest.raises(ValueError, match=r"for a name\. Rename them"):
        WeightedSum({"near": CosineDistance(), name: CosineDistance()})


def test_progress_is_a_fraction() -> None:
    with pytest.raises(ValueError, match="from 0 to 1, got 3"):
        WeightedSum(terms()).set_progress(3.0)
    with pytest.raises(ValueError, match="until=0"):
        linear_decay(1.0, until=0.0)


def rows(width: int = 8, count: int = 5) -> Tensor:
    return torch.randn(count, width, dtype=torch.float64)


def test_matryoshka_is_the_loss_of_the_cut_rows_bank_and_keys_at_each_width() -> None:
    student, teacher, bank = rows(), rows(), rows()
    keys, bank_keys = torch.arange(5), torch.arange(3, 8)
    nested = Matryoshka(losses.CrossKL(temperature=0.1), (2, 4, 8), (1.0, 0.5, 2.0))
    value = nested(student, teacher, bank, keys=keys, bank_keys=bank_keys)
    expected = {
        w: oracles.cross_kl(
            student[:, :w], teacher[:, :w], bank[:, :w], keys=keys, bank_keys=bank_keys, temperature=0.1
        )
        for w in (2, 4, 8)
    }
    assert float(value) == pytest.approx(expected[2] + 0.5 * expected[4] + 2 * expected[8])
    assert {name: float(part) for name, part in nested.parts().items()} == pytest.approx(
        {str(w): value for w, value in expected.items()}
    )


def test_the_full_width_alone_is_the_loss_and_falling_widths_are_rising_ones() -> None:
    student, teacher = rows(), rows()
    torch.testing.assert_close(
        Matryoshka(losses.CosineDistance(), [8])(student, teacher), losses.cosine_distance(student, teacher)
    )
    falling, rising = (Matryoshka(losses.EmbeddingMSE(), widths)(student, teacher) for widths in [(8, 4), (4, 8)])
    torch.testing.assert_close(falling, rising)


def test_cut_rows_are_normalised_again_on_both_sides() -> None:
    student, teacher = rows(), rows()
    value = Matryoshka(losses.EmbeddingMSE(), [4])(student, teacher)
    beyond = torch.rand(5, 8, dtype=torch.float64).index_fill(1, torch.arange(4), 0.0)
    torch.testing.assert_close(Matryoshka(losses.EmbeddingMSE(), [4])(student + beyond, teacher + 3 * beyond), value)

    def cut_of_unit_rows(student: Tensor, teacher: Tensor) -> Tensor:
        return (F.normalize(student)[:, :4] - F.normalize(teacher)[:, :4]).square().sum(-1).mean()

    def cut_teacher_not_renormalised(student: Tensor, teacher: Tensor) -> Tensor:
        return (F.normalize(student[:, :4]) - F.normalize(teacher)[:, :4]).square().sum(-1).mean()

    for wrong in (cut_of_unit_rows, cut_teacher_not_renormalised):
        assert not torch.allclose(wrong(student, teacher), value, rtol=0.05)
        assert not torch.allclose(wrong(student + beyond, teacher + 3 * beyond), wrong(student, teacher), rtol=0.05)


def test_the_gradient_of_entries_beyond_a_width_comes_from_wider_ones() -> None:
    student, teacher = rows().requires_grad_(), rows()
    Matryoshka(losses.CosineDistance(), [4])(student, teacher).backward()
    assert student.grad is not None
    assert student.grad[:, :4].all()
    assert not student.grad[:, 4:].any()
    Matryoshka(losses.CosineDistance(), [4, 8])(student, teacher).backward()
    assert student.grad[:, 4:].all()


@pytest.mark.usefixtures("unchecked")
def test_a_teacher_of_another_width_stays_whole_where_the_loss_allows_it() -> None:
    student, teacher = rows(8), rows(11)
    value = Matryoshka(losses.GramKL(), [4, 8])(student, teacher)
    assert float(value) == pytest.approx(
        oracles.gram_kl(student[:, :4], teacher) + oracles.gram_kl(student, teacher), rel=1e-6
    )
    with pytest.raises(ValueError, match=r"cross_kl compares vectors of one width"):
        Matryoshka(losses.CrossKL(), [4, 8])(student, teacher)


def test_bank_and_progress_reach_what_is_inside() -> None:
    assert Matryoshka(losses.CrossKL(), [4]).uses_bank
    assert not Matryoshka(losses.GramMSE(), [4]).uses_bank
    inner = WeightedSum(terms(), {"near": linear_decay(1.0), "far": 1.0})
    outer = WeightedSum({"nested": Matryoshka(inner, [4, 8])})
    outer.set_progress(0.5)
    assert inner.progress == 0.5
    assert outer.uses_bank
    Matryoshka(losses.GramMSE(), [4]).set_progress(0.5)
    ignored = Matryoshka(losses.GramMSE(), [4])(rows(), rows(), keys=torch.arange(5))
    assert ignored.isfinite()


def test_what_matryoshka_says_of_itself() -> None:
    nested = Matryoshka(losses.CrossKL(temperature=0.1), [4, 8], [1.0, 0.5])
    again = Matryoshka(losses.CrossKL(temperature=0.1), [4, 8], [1.0, 0.5])
    assert nested.parts() == {}
    said = repr(nested)
    nested(rows(), rows())
    assert repr(nested) == said == repr(again)
    assert "widths=(4, 8), weights=(1.0, 0.5)" in said
    assert "CrossKL(temperature=0.1" in said
    assert repr(Matryoshka(losses.CrossKL(temperature=0.1), [4, 8])) != said
    nested(rows().requires_grad_(), rows())
    assert all(not part.requires_grad for part in nested.parts().values())


@pytest.mark.parametrize("widths", [[], [4, 4], [4, 8, 2], [0, 4], [-1]])
def test_widths_rise_or_fall_from_one(widths: list[int]) -> None:
    with pytest.raises(ValueError, match=r"widths from 1 that rise, or fall"):
        Matryoshka(losses.CosineDistance(), widths)


@pytest.mark.parametrize("weights", [[1.0], [1.0, 0.0], [1.0, float("nan")], [-1.0, 1.0]])
def test_every_width_has_a_weight_above_zero(weights: list[float]) -> None:
    with pytest.raises(ValueError, match=r"weight above 0 for each of its widths \(4, 8\)"):
        Matryoshka(losses.CosineDistance(), [4, 8], weights)


def test_a_weight_may_be_given_by_width() -> None:
    student, teacher = rows(), rows()
    by_width = Matryoshka(losses.CosineDistance(), [8, 4], {4: 0.5, 8: 2.0})
    assert by_width.weights == (2.0, 0.5)
    assert torch.equal(
        by_width(student, teacher), Matryoshka(losses.CosineDistance(), [8, 4], [2.0, 0.5])(student, teacher)
    )
    with pytest.raises(ValueError, match=r"widths \(4, 8\) and weights of \[4, 6\]"):
        Matryoshka(losses.CosineDistance(), [4, 8], {4: 1.0, 6: 1.0})


@pytest.mark.usefixtures("unchecked")
def test_matryoshka_says_what_does_not_fit() -> None:
    for widths in (4, (2.0, 4.0), "48"):
        with pytest.raises(TypeError, match=r"widths as whole numbers, such as \(64, 128, 256\)"):
            Matryoshka(losses.CosineDistance(), widths)  # type: ignore[arg-type]
    nested, student, teacher = Matryoshka(losses.CrossKL(), (2, 4)), rows(), rows()
    for width in (7, 9):
        with pytest.raises(ValueError, match=rf"bank \(5, {width}\) beside teacher \(5, 8\), of another width"):
            nested(student, teacher, rows(width))
    with pytest.raises(ValueError, match=r"Matryoshka expects student as rows of vectors"):
        nested(student[0], teacher[0])
    with pytest.raises(TypeError, match=r"Matryoshka takes teacher as a torch\.Tensor"):
        nested(student, teacher.numpy())


def test_a_width_above_the_students_is_refused() -> None:
    with pytest.raises(ValueError, match=r"widths \(4, 16\) and got student \(5, 8\): none can be above 8"):
        Matryoshka(losses.CosineDistance(), [4, 16])(rows(), rows())


def test_the_terms_of_a_sum_fade_at_every_width() -> None:
    student, teacher = rows(), rows()
    inner = WeightedSum(
        {"near": losses.EmbeddingMSE(), "gram": losses.GramMSE(), "kl": losses.GramKL()},
        {"near": 1.0, "gram": linear_decay(4.0, until=0.5), "kl": linear_decay(1.0, until=0.25)},
    )
    nested = Matryoshka(inner, (2, 8))
    for progress, gram, kl in ((0.0, 4.0, 1.0), (0.25, 2.0, 0.0), (0.5, 0.0, 0.0), (1.0, 0.0, 0.0)):
        nested.set_progress(progress)
        expected = sum(
            oracles.embedding_mse(student[:, :w], teacher[:, :w])
            + gram * oracles.gram_mse(student[:, :w], teacher[:, :w])
            + kl * oracles.gram_kl(student[:, :w], teacher[:, :w])
            for w in (2, 8)
        )
        assert float(nested(student, teacher)) == pytest.approx(float(expected), rel=1e-6)


def test_sums_can_be_pickled() -> None:
    schedules = {"twin": linear_decay(1.0, until=0.5), "gram": 2.0}
    one = WeightedSum({"twin": CosineDistance(), "gram": GramMSE()}, schedules)
    other = pickle.loads(pickle.dumps(one))
    for progress in (0.0, 0.3, 0.9):
        one.set_progress(progress)
        other.set_progress(progress)
        assert one.weights() == other.weights()


@pytest.mark.usefixtures("unchecked")
def test_a_bank_that_nothing_uses_is_refused() -> None:
    for loss in (WeightedSum({"twin": CosineDistance()}), Matryoshka(cross_kl, (4, 8)), Matryoshka(GramMSE(), (4, 8))):
        with pytest.raises(ValueError, match=r"got a bank, and none of its losses has `uses_bank`\. Give the Module"):
            loss(torch.randn(5, 8), torch.randn(5, 8), torch.randn(3, 8))


@pytest.mark.usefixtures("unchecked")
def test_terms_have_names() -> None:
    with pytest.raises(TypeError, match=r'losses by name, \{"twin": CosineDistance\(\)\}, got list'):
        WeightedSum([CosineDistance()])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r'weights by name, \{"twin": 1\.0\}, got list'):
        WeightedSum({"twin": CosineDistance()}, [1.0])  # type: ignore[arg-type]
