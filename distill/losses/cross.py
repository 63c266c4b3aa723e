"""The student x teacher matrix: a student's row against the teacher's row, or against its own twin in it.

Columns are all teacher rows of the batch, then the rows of the bank: teacher vectors of other texts. Keys name texts:
where a row and a column carry the same key they are the same text, and the column is left out of the row.
"""

import math
from numbers import Real
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from distill.similarity import check_bank, check_device, check_pairs, check_tensor, check_widths
from distill.streaming import contrastive, divergence, moments


def cross_kl(
    student: Float[Tensor, "b d"],
    teacher: Float[Tensor, "b d"],
    bank: Float[Tensor, "n d"] | None = None,
    *,
    keys: Int[Tensor, "b"] | None = None,
    bank_keys: Int[Tensor, "n"] | None = None,
    temperature: float = 0.05,
    teacher_temperature: float | None = None,
) -> Float[Tensor, ""]:
    """KL from the teacher's to the student's distribution over the teacher's vectors.

    Equals the mean over i of KL(softmax(t_i . B / teacher_temperature) || softmax(s_i . B / temperature)), summed over
    the columns B, without column i (it says only "you are you") and without columns of row i's key. A row with no
    column left counts 0. Not multiplied by temperature^2: its gradient grows as 1 / temperature.
    Widths must be equal. Three products of (b, b + n, d) with the gradient; O((b + n) d) memory and two chunks of rows
    of the matrix: on a CPU 32 MB together, growing to 512 MB at 262,144 columns; on a GPU 512 MB. Hinton et al. 2015; Fang et al. 2021 (SEED).
    """
    check_temperatures("cross_kl", temperature, teacher_temperature)
    _check_columns("cross_kl", student, teacher, bank, keys, bank_keys)
    return divergence.cross_kl(student, teacher, bank, keys, bank_keys, temperature, teacher_temperature or temperature)


def cross_contrastive(
    student: Float[Tensor, "b d"],
    teacher: Float[Tensor, "b d"],
    bank: Float[Tensor, "n d"] | None = None,
    *,
    keys: Int[Tensor, "b"] | None = None,
    bank_keys: Int[Tensor, "n"] | None = None,
    temperature: float = 0.05,
    symmetric: bool = False,
    false_negative_margin: float | None = None,
) -> Float[Tensor, ""]:
    """InfoNCE: each student row finds its own teacher twin among all columns.

    Equals the mean over i of -log softmax(s_i . B / temperature)[i]. Columns of row i's key are no negatives; column i
    always is the positive. `symmetric` averages with the other direction: each teacher row of the batch finds its
    student among all student rows (bank rows ask nothing). `false_negative_margin` leaves out columns whose cosine to
    row i's teacher vector is above 1 - margin: texts that the teacher hardly tells apart, at the cost of one more product.
    Not multiplied by temperature^2. Widths must be equal. Exact to 1e-5 in float32 down to losses of 1e-9; two products
    of (b, b + n, d) with the gradient, a third of (b, b, d) if symmetric, O((b + n) d) memory. van den Oord et al. 2018.
    """
    check_temperatures("cross_contrastive", temperature)
    _check_margin("cross_contrastive", false_negative_margin)
    _check_columns("cross_contrastive", student, teacher, bank, keys, bank_keys)
    loss = contrastive.cross_contrastive_both_ways if symmetric else contrastive.cross_contrastive
    return loss(student, teacher, bank, keys, bank_keys, temperature, false_negative_margin)


def cross_mse(
    student: Float[Tensor, "b d"],
    teacher: Float[Tensor, "b d"],
    bank: Float[Tensor, "n d"] | None = None,
    *,
    keys: Int[Tensor, "b"] | None = None,
    bank_keys: Int[Tensor, "n"] | None = None,
) -> Float[Tensor, ""]:
    """How well a student row's cosines to the teacher's vectors match those of its teacher row.

    Equals the mean over i and all columns j of (s_i . b_j - t_i . b_j)^2, the own twin included: a column that is the same
    text says what any other does. Keys are therefore checked and leave out nothing. Widths must be equal.
    From moments of the width, (3.2 b + 1.2 n) d^2 FLOP with the gradient and O(d^2) memory; from tiles of the (b, b + n)
    matrix where that is less. In float32 exact to 1e-5, next to the teacher too. On CUDA in float64.
    """
    _check_columns("cross_mse", student, teacher, bank, keys, bank_keys)
    return moments.cross_mse(student, teacher, bank)


def _check_columns(
    caller: str, student: Tensor, teacher: Tensor, bank: Tensor | None, keys: Tensor | None, bank_keys: Tensor | None
) -> None:
    """Rows in pairs of one width, and an integer for each row that is to have a key. Bank rows without keys are other texts."""
    check_pairs(caller, student, teacher)
    check_widths(caller, student, teacher)
    if bank is not None:
        check_bank(caller, teacher, bank)
    check_keys(caller, student, bank, keys, bank_keys)


def check_keys(caller: str, rows: Tensor, bank: Tensor | None, keys: Tensor | None, bank_keys: Tensor | None) -> None:
    """An integer for each row and for each row of the bank, if they have any."""
    if bank_keys is not None and (keys is None or bank is None):
        raise ValueError(f"{caller} got bank_keys without {'keys' if keys is None else 'bank'}. Give both, or neither.")
    _check_keys_of(caller, "keys", keys, rows)
    if bank is not None:
        _check_keys_of(caller, "bank_keys", bank_keys, bank)
    if keys is None or bank_keys is None or keys.dtype == bank_keys.dtype:
        return
    if {keys.dtype, bank_keys.dtype} & {torch.uint16, torch.uint32, torch.uint64}:
        raise ValueError(
            f"{caller} compares keys ({keys.dtype}) with bank_keys ({bank_keys.dtype}), and torch does not: give both one dtype."
        )


def _check_keys_of(caller: str, name: str, keys: Tensor | None, rows: Tensor) -> None:
    if keys is None:
        return
    check_tensor(caller, keys, name)
    check_device(caller, name, keys, rows)
    if keys.shape != (len(rows),) or keys.is_floating_point() or keys.dtype == torch.bool:
        raise ValueError(
            f"{caller} needs one integer of {name} for each of {len(rows)} rows, got {keys.dtype} {tuple(keys.shape)}."
        )


def _check_margin(caller: str, margin: float | None) -> None:
    if margin is not None and not 0 < margin < 2:
        raise ValueError(
            f"{caller} takes a false_negative_margin between 0 and 2 (of cosine), got {margin}. "
            "Try 0.05; None leaves no column out."
        )


def check_temperatures(
    caller: str,
    temperature: float,
    teacher_temperature: float | None = None,
    *,
    of: str = "cosines",
    usual: float = 0.05,
) -> None:
    named = {"temperature": temperature, "teacher_temperature": teacher_temperature}
    for name, value in named.items():
        if isinstance(value, Tensor):
            raise TypeError(f"{caller} takes {name} as a number, got a tensor: it is not learned. Give {name}.item().")
        if value is None and name == "teacher_temperature":
            continue
        if not isinstance(value, Real):
            raise TypeError(f"{caller} takes {name} as a number, got {value!r}. Try {usual}.")
        if not (0 < value < math.inf):
            raise ValueError(f"{caller} divides {of} by {name}: it must be above 0, got {value}. Try {usual}.")


class CrossKL(nn.Module):
    """`cross_kl` as a Module, which keeps its temperatures."""

    uses_bank: ClassVar[bool] = True
    runs_on_shares: ClassVar[bool] = True

    def __init__(self, *, temperature: float = 0.05, teacher_temperature: float | None = None) -> None:
        super().__init__()
        check_temperatures("CrossKL", temperature, teacher_temperature)
        self.temperature, self.teacher_temperature = temperature, teacher_temperature

    def forward(
        self,
        student: Float[Tensor, "b d"],
        teacher: Float[Tensor, "b d"],
        bank: Float[Tensor, "n d"] | None = None,
        *,
        keys: Int[Tensor, "b"] | None = None,
        bank_keys: Int[Tensor, "n"] | None = None,
    ) -> Float[Tensor, ""]:
        return cross_kl(
            student,
            teacher,
            bank,
            keys=keys,
            bank_keys=bank_keys,
            temperature=self.temperature,
            teacher_temperature=self.teacher_temperature,
        )

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, teacher_temperature={self.teacher_temperature}"


class CrossContrastive(nn.Module):
    """`cross_contrastive` as a Module, which keeps its temperature, direction and margin."""

    uses_bank: ClassVar[bool] = True
    runs_on_shares: ClassVar[bool] = True

    def __init__(
        self, *, temperature: float = 0.05, symmetric: bool = False, false_negative_margin: float | None = None
    ) -> None:
        super().__init__()
        check_temperatures("CrossContrastive", temperature)
        _check_margin("CrossContrastive", false_negative_margin)
        self.temperature, self.symmetric = temperature, symmetric
        self.false_negative_margin = false_negative_margin

    def forward(
        self,
        student: Float[Tensor, "b d"],
        teacher: Float[Tensor, "b d"],
        bank: Float[Tensor, "n d"] | None = None,
        *,
        keys: Int[Tensor, "b"] | None = None,
        bank_keys: Int[Tensor, "n"] | None = None,
    ) -> Float[Tensor, ""]:
        return cross_contrastive(
            student,
            teacher,
            bank,
            keys=keys,
            bank_keys=bank_keys,
            temperature=self.temperature,
            symmetric=self.symmetric,
            false_negative_margin=self.false_negative_margin,
        )

    def extra_repr(self) -> str:
        margin = "" if self.false_negative_margin is None else f", false_negative_margin={self.false_negative_margin}"
        return f"temperature={self.temperature}, symmetric={self.symmetric}{margin}"


class CrossMSE(nn.Module):
    """`cross_mse` as a Module."""

    uses_bank: ClassVar[bool] = True
    runs_on_shares: ClassVar[bool] = True

    def forward(
        self,
        student: Float[Tensor, "b d"],
        teacher: Float[Tensor, "b d"],
        bank: Float[Tensor, "n d"] | None = None,
        *,
        keys: Int[Tensor, "b"] | None = None,
        bank_keys: Int[Tensor, "n"] | None = None,
    ) -> Float[Tensor, ""]:
        return cross_mse(student, teacher, bank, keys=keys, bank_keys=bank_keys)
