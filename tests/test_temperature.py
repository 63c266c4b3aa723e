"""The calibrated temperature against one row, one column at a time; what it refuses; what it warns of."""

import math
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distill.losses import calibrate_temperature, temperature


def perplexity_of(
    tau: float, teacher: Tensor, bank: Tensor | None = None, keys: Tensor | None = None, bank_keys: Tensor | None = None
) -> float:
    """The geometric mean of the rows' perplexities, the slow way."""
    vectors, names = oracles._columns(teacher, bank, keys, bank_keys)
    entropies = []
    for i in range(len(teacher)):
        logits = [float(vectors[i] @ b) / tau for b, name in zip(vectors, names, strict=True) if name != names[i]]
        if logits:
            entropies.append(-math.fsum(p * math.log(p) for p in oracles.softmax(logits) if p))
    return math.exp(oracles.mean(entropies))


@contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    b=st.integers(1, 30),
    n=st.integers(0, 30),
    width=st.integers(4, 40),  # of 2, rows in a narrow cone tie in float32, which is refused
    share=st.floats(0.02, 0.98),
    near=st.sampled_from([0.0, 1.0, 10.0]),
)
def test_the_temperature_found_has_the_perplexity_asked(
    seed: int, b: int, n: int, width: int, share: float, near: float
) -> None:
    chance = torch.Generator().manual_seed(seed)
    teacher, bank = (torch.randn(size, width, generator=chance) + near for size in (b, n + 3))
    asked = 1 + share * (b + n + 1)
    with quiet():
        tau = calibrate_temperature(teacher, bank, perplexity=asked)
    assert perplexity_of(tau, teacher, bank) == pytest.approx(asked, rel=0.01)


@pytest.mark.parametrize("names", [("keys",), ("keys", "bank_keys")])
def test_equal_texts_are_left_out_by_their_keys(names: tuple[str, ...]) -> None:
    teacher, other = torch.randn(20, 8), torch.randn(10, 8)
    bank = torch.cat([teacher[:10], other])
    given = {"keys": torch.arange(20) // 2, "bank_keys": torch.cat([torch.arange(10) // 2, torch.arange(90, 100)])}
    chosen = {name: given[name] for name in names}
    with quiet():
        tau = calibrate_temperature(teacher, bank, perplexity=6.0, **chosen)
        blind = calibrate_temperature(teacher, bank, perplexity=6.0)
    assert perplexity_of(tau, teacher, bank, **chosen) == pytest.approx(6, rel=0.01)
    assert perplexity_of(blind, teacher, bank, **chosen) != pytest.approx(6, rel=0.02)


def test_without_its_own_twin_left_out_a_row_would_not_have_the_perplexity() -> None:
    teacher = torch.randn(50, 8)
    with quiet():
        tau = calibrate_temperature(teacher, perplexity=10.0)
    logits = torch.nn.functional.normalize(teacher) @ torch.nn.functional.normalize(teacher).T / tau
    with_twin = torch.special.entr(logits.softmax(-1)).sum(-1).mean().exp()
    assert float(with_twin) != pytest.approx(10, rel=0.05)


def test_length_of_rows_dtype_and_order_change_nothing_that_matters() -> None:
    teacher, bank = torch.randn(40, 8), torch.randn(60, 8)
    with quiet():
        tau = calibrate_temperature(teacher, bank, perplexity=10.0)
        assert calibrate_temperature(teacher, bank, perplexity=10.0) == tau
        scaled = calibrate_temperature(3 * teacher, bank * torch.rand(60, 1), perplexity=10.0)
        turned = calibrate_temperature(teacher.flip(0), bank.flip(0), perplexity=10.0)
        half = calibrate_temperature(teacher.half(), bank.half(), perplexity=10.0)
        double = calibrate_temperature(teacher.double(), bank.double(), perplexity=10.0)
    assert [scaled, turned, double] == pytest.approx([tau] * 3, rel=1e-4)
    assert half == pytest.approx(tau, rel=1e-2)
    assert calibrate_temperature(teacher.requires_grad_(), bank, perplexity=10.0) == tau


def test_higher_perplexity_is_a_higher_temperature_and_the_default_has_a_say() -> None:
    teacher = torch.randn(300, 16)
    taus = [calibrate_temperature(teacher, perplexity=asked) for asked in (5.0, 10.0, 30.0, 100.0)]
    assert taus == sorted(taus)
    assert calibrate_temperature(teacher) == taus[2]


def test_many_rows_are_sampled_evenly_and_in_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = torch.randn(3000, 8)
    tau = calibrate_temperature(teacher)
    monkeypatch.setattr(temperature, "CHUNK_COSINES", 7000)
    assert calibrate_temperature(teacher) == tau
    monkeypatch.setattr(temperature, "MOST_COSINES", 300 * 3000)
    assert calibrate_temperature(teacher) == pytest.approx(tau, rel=0.1)
    monkeypatch.setattr(temperature, "MOST_COSINES", 10)
    calibrate_temperature(teacher, perplexity=500.0)  # one row is the least


def test_rows_without_columns_have_no_say() -> None:
    teacher, bank = torch.randn(6, 8), torch.randn(20, 8)
    keys, bank_keys = torch.tensor([1, 1, 2, 3, 4, 5]), torch.full((20,), 1)
    with quiet():
        tau = calibrate_temperature(teacher, bank, perplexity=5.0, keys=keys, bank_keys=bank_keys)
    assert perplexity_of(tau, teacher, bank, keys, bank_keys) == pytest.approx(5, rel=0.01)


@pytest.mark.parametrize("perplexity", [1.0, 0.0, -3.0, 49.0, 1e9, math.nan, math.inf])
def test_a_perplexity_that_no_temperature_has_is_refused(perplexity: float) -> None:
    with pytest.raises(ValueError, match=rf"between 1 .* columns, here 49; got {re.escape(str(perplexity))}. Try 4.9"):
        calibrate_temperature(torch.randn(50, 8), perplexity=perplexity)


def test_too_few_columns_are_refused() -> None:
    for teacher, keys in [
        (torch.randn(3, 8), None),
        (torch.randn(0, 8), None),
        (torch.randn(9, 8), torch.ones(9).int()),
    ]:
        with pytest.raises(ValueError, match=r"needs 3 other texts for each row, got [02]\. Give more"):
            calibrate_temperature(teacher, perplexity=1.5, keys=keys)


def test_vectors_that_are_not_finite_are_refused_by_their_row() -> None:
    teacher, bank = torch.randn(9, 8), torch.randn(9, 8)
    bank[4, 2], bank[5, 0] = math.nan, math.inf
    with pytest.raises(ValueError, match=r"2 vectors with NaN or infinite entries, the first in row 13 of"):
        calibrate_temperature(teacher, bank, perplexity=3.0)


def test_equal_vectors_without_keys_are_refused_where_they_leave_no_temperature() -> None:
    teacher = torch.randn(20, 8).repeat(5, 1)
    with pytest.raises(
        ValueError, match=r"no temperature gives perplexity 3.0: 4 columns share .*by keys=.*more than 4"
    ):
        calibrate_temperature(teacher, perplexity=3.0)
    with quiet():
        assert calibrate_temperature(teacher, perplexity=6.0, keys=torch.arange(20).repeat(5)) > 0


@pytest.mark.usefixtures("unchecked")
def test_widths_and_keys_that_do_not_fit_are_refused() -> None:
    teacher = torch.randn(9, 8)
    with pytest.raises(ValueError, match=r"bank \(4, 7\) beside teacher \(9, 8\), of another width"):
        calibrate_temperature(teacher, torch.randn(4, 7))
    with pytest.raises(TypeError, match=r"teacher as a torch\.Tensor, got numpy"):
        calibrate_temperature(teacher.numpy())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"bank as a torch\.Tensor, got builtins\.list"):
        calibrate_temperature(teacher, teacher.tolist())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="bank_keys without keys"):
        calibrate_temperature(teacher, teacher, bank_keys=torch.arange(9))
    with pytest.raises(ValueError, match=r"integer of keys for each of 9 rows, got torch.int64 \(4,\)"):
        calibrate_temperature(teacher, keys=torch.arange(4))
    with pytest.raises(ValueError, match=r"bank_keys without bank"):
        calibrate_temperature(teacher, keys=torch.arange(9), bank_keys=torch.arange(4))


def warned(teacher: Tensor, perplexity: float) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        calibrate_temperature(teacher, perplexity=perplexity)
    assert all(warning.category is UserWarning for warning in caught)
    return [str(warning.message) for warning in caught]


def test_rows_that_are_as_they_should_be_are_not_warned_of() -> None:
    assert warned(torch.randn(400, 16), 30.0) == []


def test_flat_rows_are_warned_of() -> None:
    (message,) = warned(torch.randn(100, 16), 95.0)
    assert re.search(
        r"100 of 100 teacher rows at temperature .* flat.* half of their 99 columns.*less than 95", message
    )


def test_saturated_rows_are_warned_of() -> None:
    (message,) = warned(torch.randn(400, 16), 1.1)
    assert re.search(r"\d+ of 400 teacher rows at temperature .* saturated.* below 1.1.*more than 1.1", message)


def test_near_duplicates_are_warned_of() -> None:
    teacher = torch.randn(400, 16)
    teacher[:60] = teacher[60:120] + 0.01 * torch.randn(60, 16)
    (message,) = warned(teacher, 10.0)
    assert re.search(r"\d+ of 400 .* more than 0.9 to one column, of cosine 1.00 .*near-dup.*more than 10", message)


def test_the_warning_points_to_the_caller() -> None:
    program = "import torch\nfrom distill.losses import calibrate_temperature\ncalibrate_temperature(torch.randn(100, 16), perplexity=95)\n"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert done.stderr.startswith("<string>:3: UserWarning: calibrate_temperature: 100 of 100")
