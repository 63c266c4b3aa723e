"""All losses in one table: what every loss must satisfy is tested here for each of its rows."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import oracles
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distill import losses
from distill.losses import cross_contrastive


@dataclass(frozen=True, kw_only=True)
class Case:
    function: str
    module: str
    options: dict[str, Any] = field(default_factory=dict)
    family: str
    zero_at_teacher: bool = True

    @property
    def loss(self) -> Callable[..., Tensor]:
        return getattr(losses, self.function)

    @property
    def crosses(self) -> bool:
        return self.family == "cross"

    @property
    def equal_widths(self) -> bool:
        return self.family != "relational"

    def __call__(self, *args: Tensor | None, **kwargs: Tensor | None) -> Tensor:
        return self.loss(*args, **kwargs, **self.options)

    def oracle(self, *args: Tensor | None, **kwargs: Tensor | None) -> float:
        return getattr(oracles, self.function)(*args, **kwargs, **self.options)

    def __str__(self) -> str:
        return "-".join([self.function, *map(str, self.options)])


CASES = [
    Case(function="cosine_distance", module="CosineDistance", family="pointwise"),
    Case(function="embedding_mse", module="EmbeddingMSE", family="pointwise"),
    Case(function="cross_kl", module="CrossKL", family="cross"),
    Case(
        function="cross_kl",
        module="CrossKL",
        family="cross",
        options={"temperature": 0.2, "teacher_temperature": 0.1},
        zero_at_teacher=False,
    ),
    Case(function="cross_contrastive", module="CrossContrastive", family="cross", zero_at_teacher=False),
    Case(
        function="cross_contrastive",
        module="CrossContrastive",
        family="cross",
        options={"temperature": 0.1, "symmetric": True},
        zero_at_teacher=False,
    ),
    Case(function="cross_mse", module="CrossMSE", family="cross"),
    Case(function="gram_mse", module="GramMSE", family="relational"),
    Case(function="similarity_preserving", module="SimilarityPreserving", family="relational"),
    Case(function="cka", module="CKA", family="relational"),
    Case(function="gram_kl", module="GramKL", family="relational"),
    Case(
        function="gram_kl",
        module="GramKL",
        family="relational",
        options={"temperature": 0.2, "teacher_temperature": 0.1},
        zero_at_teacher=False,
    ),
    Case(function="rkd_distance", module="RKDDistance", family="relational"),
    Case(function="rkd_angle", module="RKDAngle", family="relational"),
    Case(function="rank_hinge", module="RankHinge", family="relational", zero_at_teacher=False),
    Case(
        function="rank_hinge", module="RankHinge", family="relational", options={"margin": 0.3}, zero_at_teacher=False
    ),
]
every_loss = pytest.mark.parametrize("case", CASES, ids=str)
cross_loss = pytest.mark.parametrize("case", [c for c in CASES if c.crosses], ids=str)
masking_loss = pytest.mark.parametrize("case", [c for c in CASES if c.crosses and c.function != "cross_mse"], ids=str)
equal_width_loss = pytest.mark.parametrize("case", [c for c in CASES if c.equal_widths], ids=str)


def inputs(case: Case, b: int, dtype: torch.dtype = torch.float64, d: int = 8) -> tuple[Tensor, Tensor]:
    teacher = torch.randn(b, d if case.equal_widths else d + 3, dtype=torch.float64)
    student = teacher[:, :d] + 0.5 * torch.randn(b, d, dtype=torch.float64)
    return student.to(dtype), teacher.to(dtype)


def columns(case: Case, b: int, n: int = 5, dtype: torch.dtype = torch.float64, d: int = 8) -> dict[str, Tensor]:
    """A bank and keys with texts that occur twice, for the losses that take them."""
    if not case.crosses:
        return {}
    keys, bank_keys = torch.randint(b, (b,)), torch.randint(b, (n,))
    return {"bank": torch.randn(n, d, dtype=dtype), "keys": keys, "bank_keys": bank_keys}


def gradient(loss: Callable[[Tensor], Tensor], student: Tensor) -> Tensor:
    leaf = student.detach().clone().requires_grad_()
    loss(leaf).backward()
    assert leaf.grad is not None
    return leaf.grad


@every_loss
@pytest.mark.parametrize("b", [1, 2, 7, 300])
@pytest.mark.parametrize("with_bank", [False, True])
def test_equals_the_oracle(case: Case, b: int, with_bank: bool) -> None:
    student, teacher = inputs(case, b)
    extra = columns(case, b) if with_bank else {}
    expected = torch.tensor(case.oracle(student, teacher, **extra), dtype=torch.float64)
    torch.testing.assert_close(case(student, teacher, **extra), expected, rtol=1e-9, atol=1e-12)
    narrow = {k: v.float() if v.is_floating_point() else v for k, v in extra.items()}
    single = case(student.float(), teacher.float(), **narrow)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), expected, rtol=2e-5, atol=2e-6)


@every_loss
def test_keys_without_bank_and_bank_without_keys_equal_the_oracle(case: Case) -> None:
    student, teacher = inputs(case, 7)
    full = columns(case, 7)
    for names in [("keys",), ("bank",), ("bank", "keys")]:
        extra = {name: full[name] for name in names if name in full}
        assert float(case(student, teacher, **extra)) == pytest.approx(case.oracle(student, teacher, **extra), rel=1e-9)


@every_loss
def test_gradcheck(case: Case) -> None:
    for b in (1, 2, 5):
        student, teacher = inputs(case, b, d=3)
        for extra in ({}, columns(case, b, d=3)):
            assert torch.autograd.gradcheck(lambda s: case(s, teacher, **extra), (student.requires_grad_(),))  # noqa: B023


@every_loss
def test_teacher_and_bank_get_no_gradient_and_the_student_does(case: Case) -> None:
    student, teacher = (x.requires_grad_() for x in inputs(case, 7))
    bank = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    case(student, teacher, **({"bank": bank} if case.crosses else {})).backward()
    assert teacher.grad is None
    assert bank.grad is None
    assert student.grad is not None
    assert student.grad.abs().max() > 1e-6


@pytest.mark.parametrize("case", [c for c in CASES if c.zero_at_teacher], ids=str)
@pytest.mark.parametrize("b", [1, 7])
def test_zero_with_zero_gradient_where_the_student_is_the_teacher(case: Case, b: int) -> None:
    _, teacher = inputs(case, b)
    extra = columns(case, b)
    assert abs(float(case(teacher, teacher, **extra))) < 1e-12
    assert gradient(lambda s: case(s, teacher, **extra), teacher).abs().max() < 1e-7
    if b > 1:
        assert float(case(teacher + 0.1 * torch.randn_like(teacher), teacher, **extra)) > 1e-6


@pytest.mark.parametrize("symmetric", [False, True])
def test_contrastive_grows_when_the_student_leaves_the_teacher(symmetric: bool) -> None:
    teacher = torch.eye(6, dtype=torch.float64)
    at_teacher = cross_contrastive(teacher, teacher, symmetric=symmetric)
    assert float(cross_contrastive(teacher + 0.3 * torch.randn(6, 6), teacher, symmetric=symmetric)) > float(at_teacher)
    assert float(cross_contrastive(teacher.roll(1, 0), teacher, symmetric=symmetric)) > 10


@every_loss
def test_order_of_rows_does_not_matter_but_their_pairing_does(case: Case) -> None:
    student, teacher = inputs(case, 7)
    extra = columns(case, 7)
    before = case(student, teacher, **extra)
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    moved = {name: value[order] if name == "keys" else value.flip(0) for name, value in extra.items()}
    torch.testing.assert_close(case(student[order], teacher[order], **moved), before)
    assert not torch.allclose(case(student[order], teacher, **extra), before, rtol=1e-3)


@every_loss
def test_length_of_rows_does_not_matter(case: Case) -> None:
    student, teacher = inputs(case, 7)
    extra = columns(case, 7)
    before = case(student, teacher, **extra)
    lengths = torch.rand(7, 1, dtype=torch.float64) * 10 + 0.1
    scaled = extra | ({"bank": extra["bank"] * 7} if extra else {})
    torch.testing.assert_close(case(student * lengths, teacher * lengths.flip(0), **scaled), before)


@every_loss
def test_rotation_of_the_whole_space_does_not_matter(case: Case) -> None:
    student, teacher = inputs(case, 7)
    extra = columns(case, 7)
    before = case(student, teacher, **extra)
    rotation = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q
    turned = extra | ({"bank": extra["bank"] @ rotation} if extra else {})
    torch.testing.assert_close(
        case(student @ rotation, teacher @ rotation if case.equal_widths else teacher, **turned), before
    )
    if case.equal_widths:  # against a teacher that stays, only the relational losses forgive a rotation
        assert not torch.allclose(case(student @ rotation, teacher, **extra), before, rtol=1e-3)


@every_loss
def test_duplicate_and_zero_rows_have_a_value_and_a_gradient(case: Case) -> None:
    student, teacher = inputs(case, 7)
    extra = columns(case, 7)
    student[1], teacher[1] = student[0], teacher[0]
    student[2], teacher[3], student[4], teacher[4] = 0, 0, 0, 0
    for dtype in (torch.float64, torch.float32):
        pair = student.to(dtype), teacher.to(dtype)
        narrow = {k: v.to(dtype) if v.is_floating_point() else v for k, v in extra.items()}
        assert float(case(*pair, **narrow)) == pytest.approx(case.oracle(*pair, **narrow), rel=1e-5)
        found = gradient(lambda s: case(s, pair[1], **narrow), pair[0])  # noqa: B023
        assert found.isfinite().all()
        assert not found[[2, 4]].any()
        assert found[0].any()


@every_loss
def test_identical_rows_everywhere_stay_finite(case: Case) -> None:
    student, teacher = (x[:1].expand(7, -1) for x in inputs(case, 7, torch.float32))
    assert case(student, teacher).isfinite()
    assert gradient(lambda s: case(s, teacher), student).isfinite().all()


@pytest.mark.parametrize("case", [c for c in CASES if c.function in ("cross_kl", "gram_kl")], ids=str)
def test_a_row_without_columns_counts_zero(case: Case) -> None:
    student, teacher = inputs(case, 1)
    assert float(case(student, teacher)) == 0
    assert not gradient(lambda s: case(s, teacher), student).any()


@masking_loss
def test_a_batch_of_one_text_teaches_nothing_across(case: Case) -> None:
    student, teacher = inputs(case, 5)
    same = {"keys": torch.full((5,), 9)}
    assert float(case(student, teacher, **same)) == 0
    assert not gradient(lambda s: case(s, teacher, **same), student).any()
    assert float(case(student, teacher)) > 0


@masking_loss
def test_a_key_takes_the_same_text_out_of_the_columns(case: Case) -> None:
    student, teacher = inputs(case, 4)
    repeated, other = teacher[:1], torch.randn(1, 8, dtype=torch.float64)
    keys = torch.arange(4)
    masked = case(student[:1], teacher[:1], torch.cat([repeated, other]), keys=keys[:1], bank_keys=torch.tensor([0, 7]))
    torch.testing.assert_close(masked, case(student[:1], teacher[:1], other))
    blind = case(student[:1], teacher[:1], torch.cat([repeated, other]))
    assert not torch.allclose(masked, blind, rtol=1e-2)


@cross_loss
def test_distinct_keys_change_nothing_and_the_default_bank_is_the_batch(case: Case) -> None:
    student, teacher = inputs(case, 5)
    bank = torch.randn(3, 8, dtype=torch.float64)
    expected = case(student, teacher, bank)
    named = case(student, teacher, bank, keys=torch.arange(5), bank_keys=torch.arange(5, 8))
    torch.testing.assert_close(named, expected)
    torch.testing.assert_close(case(student, teacher, bank[:0]), case(student, teacher))
    assert not torch.allclose(case(student, teacher), expected)


def test_the_symmetric_side_ranks_students_only() -> None:
    student, teacher, bank = (torch.randn(4, 8, dtype=torch.float64) for _ in range(3))
    both = cross_contrastive(student, teacher, bank, symmetric=True)
    one, other = cross_contrastive(student, teacher, bank), cross_contrastive(teacher, student)
    torch.testing.assert_close(both, (one + other) / 2)


LOW = [torch.bfloat16, torch.float16]


@every_loss
@pytest.mark.parametrize("dtype", LOW)
def test_16_bit_inputs_cost_no_more_than_their_own_rounding(case: Case, dtype: torch.dtype) -> None:
    """Far inside twice the error of a naive 16-bit computation, which is of the order of the dtype's eps / temperature."""
    student, teacher = inputs(case, 64, dtype, d=32)
    extra = columns(case, 64, dtype=dtype, d=32)
    wide = {k: v.double() if v.is_floating_point() else v for k, v in extra.items()}
    value, exact = case(student, teacher, **extra), case(student.double(), teacher.double(), **wide)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-6)
    found = gradient(lambda s: case(s, teacher, **extra), student).double()
    truth = gradient(lambda s: case(s, teacher.double(), **wide), student.double())
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert ((found - truth).abs() <= torch.finfo(dtype).eps * truth.abs() + 1e-5 * truth.abs().max() + smallest).all()


@every_loss
@pytest.mark.parametrize("dtype", LOW)
def test_autocast_changes_nothing(case: Case, dtype: torch.dtype) -> None:
    student, teacher = inputs(case, 16, torch.float32, d=32)
    extra = columns(case, 16, dtype=torch.float32, d=32)
    outside, plain = case(student, teacher, **extra), gradient(lambda s: case(s, teacher, **extra), student)
    with torch.autocast("cpu", dtype=dtype):
        inside = case(student, teacher, **extra)
        naive = student @ teacher[:, :32].T
    assert naive.dtype == dtype  # autocast was on
    assert torch.equal(inside, outside)

    def loss_under_autocast(rows: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=dtype):
            return case(rows, teacher, **extra)

    assert torch.equal(gradient(loss_under_autocast, student), plain)


def test_a_small_contrastive_loss_keeps_its_gradient_in_float32() -> None:
    teacher = F.normalize(torch.randn(64, 256, dtype=torch.float64))
    student = teacher + 0.01 * torch.randn_like(teacher)
    truth = gradient(lambda s: cross_contrastive(s, teacher, temperature=0.02), student)

    def naive(rows: Tensor) -> Tensor:
        logits = F.normalize(rows) @ F.normalize(teacher.float()).T / 0.02
        return F.cross_entropy(logits, torch.arange(64))

    ours = gradient(lambda s: cross_contrastive(s, teacher.float(), temperature=0.02), student.float())
    error = (ours - truth).norm() / truth.norm()
    assert error < 1e-5
    assert (gradient(naive, student.float()) - truth).norm() / truth.norm() > 10 * error


@every_loss
@pytest.mark.usefixtures("unchecked")
def test_what_would_broadcast_is_refused(case: Case) -> None:
    student, teacher = inputs(case, 4)
    for rows in (teacher[:1], teacher[:3]):
        with pytest.raises(ValueError, match=rf"{case.function} pairs row i.*\(4, 8\).*\({len(rows)}, "):
            case(student, rows)
    with pytest.raises(ValueError, match=rf"{case.function} expects teacher as rows"):
        case(student, teacher[0])
    with pytest.raises(ValueError, match="at least one"):
        case(student[:0], teacher[:0])


@equal_width_loss
@pytest.mark.usefixtures("unchecked")
def test_other_widths_are_refused_with_the_way_out(case: Case) -> None:
    student, teacher = inputs(case, 4)
    with pytest.raises(
        ValueError, match=rf"{case.function} .*\(4, 7\) and teacher \(4, 8\).*lead_to.*Linear\(7, 8\).*gram_kl"
    ):
        case(student[:, :7], teacher)
    if case.crosses:
        with pytest.raises(
            ValueError, match=rf"{case.function} .*bank \(9, 1\) beside teacher \(4, 8\).*of one teacher"
        ):
            case(student, teacher, torch.ones(9, 1))


@cross_loss
@pytest.mark.usefixtures("unchecked")
def test_keys_that_do_not_fit_are_refused(case: Case) -> None:
    student, teacher = inputs(case, 4)
    bank, keys = torch.randn(3, 8), torch.arange(4)
    with pytest.raises(ValueError, match=r"integer of keys for each of 4 rows.*\(3,\)"):
        case(student, teacher, keys=keys[:3])
    with pytest.raises(ValueError, match=r"integer of bank_keys for each of 3 rows.*\(4,\)"):
        case(student, teacher, bank, keys=keys, bank_keys=keys)
    with pytest.raises(ValueError, match="float32"):
        case(student, teacher, keys=keys.float())
    with pytest.raises(ValueError, match=r"keys \(torch\.int64\) with bank_keys \(torch\.uint64\)"):
        case(student, teacher, bank, keys=keys, bank_keys=keys[:3].to(torch.uint64))
    with pytest.raises(ValueError, match="bank_keys without keys"):
        case(student, teacher, bank, bank_keys=keys[:3])
    with pytest.raises(ValueError, match="bank_keys"):
        case(student, teacher, keys=keys, bank_keys=keys)


@pytest.mark.parametrize("case", [c for c in CASES if "_kl" in c.function or "contrastive" in c.function], ids=str)
@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_temperatures_are_above_zero(case: Case, temperature: float) -> None:
    student, teacher = inputs(case, 4)
    named = ["temperature"] + ["teacher_temperature"] * ("_kl" in case.function)
    for name in named:
        with pytest.raises(ValueError, match=rf"{case.function} divides cosines by {name}"):
            case.loss(student, teacher, **{name: temperature})
        with pytest.raises(ValueError, match=rf"{case.module} divides cosines by {name}"):
            getattr(losses, case.module)(**{name: temperature})


@pytest.mark.parametrize("case", [c for c in CASES if "_kl" in c.function or "contrastive" in c.function], ids=str)
@pytest.mark.usefixtures("unchecked")
def test_temperatures_are_numbers(case: Case) -> None:
    student, teacher = inputs(case, 4)
    for temperature in (None, "0.05"):
        with pytest.raises(TypeError, match=rf"{case.function} takes temperature as a number, got {temperature!r}"):
            case.loss(student, teacher, temperature=temperature)
    assert torch.equal(
        case.loss(student, teacher, temperature=np.float64(0.5)), case.loss(student, teacher, temperature=0.5)
    )


@pytest.mark.usefixtures("unchecked")
def test_anchors_are_a_number_of_rows() -> None:
    for make in (
        losses.RKDAngle,
        lambda anchors: losses.rkd_angle(torch.randn(4, 3), torch.randn(4, 3), anchors=anchors),
    ):
        with pytest.raises(TypeError, match=r"anchors as a whole number of rows, got 2\.5"):
            make(anchors=2.5)


@every_loss
def test_tensors_on_another_device_are_refused(case: Case) -> None:
    student, teacher = inputs(case, 4)
    with pytest.raises(ValueError, match=rf"{case.function} computes on one device, got teacher on meta .* on cpu"):
        case(student, teacher.to("meta"))
    if case.crosses:
        extra = columns(case, 4)
        for name in extra:
            with pytest.raises(ValueError, match=rf"got {name} on meta"):
                case(student, teacher, **extra | {name: extra[name].to("meta")})
    assert case(student.to("meta"), teacher.to("meta")).device.type == "meta"


@every_loss
def test_the_module_is_the_function(case: Case) -> None:
    module = getattr(losses, case.module)(**case.options)
    student, teacher = inputs(case, 7)
    extra = columns(case, 7)
    assert torch.equal(module(student, teacher, **extra), case(student, teacher, **extra))
    assert module.uses_bank == type(module).uses_bank == case.crosses
    assert not list(module.parameters())
    assert all(f"{name}={value}" in repr(module) for name, value in case.options.items())


@pytest.mark.parametrize("name", [name for name in losses.__all__ if inspect.isclass(getattr(losses, name))])
def test_every_module_says_what_it_is(name: str) -> None:
    assert vars(getattr(losses, name)).get("__doc__")


@every_loss
@pytest.mark.usefixtures("unchecked")
def test_what_is_no_tensor_of_vectors_is_refused(case: Case) -> None:
    student, teacher = inputs(case, 4)
    with pytest.raises(TypeError, match=r"teacher as a torch\.Tensor, got numpy\.ndarray"):
        case(student, teacher.detach().numpy())
    with pytest.raises(TypeError, match=r"student as a torch\.Tensor, got builtins\.list"):
        case(student.tolist(), teacher)
    with pytest.raises(ValueError, match=r"got torch\.int64"):
        case(student.long(), teacher)
    with pytest.raises(ValueError, match=r"floating point numbers, got .* \(4, 0\)"):
        case(student[:, :0], teacher[:, :0])
    if case.crosses:
        with pytest.raises(TypeError, match=r"keys as a torch\.Tensor"):
            case(student, teacher, keys=[1, 2, 3, 4])
