"""Token batches without padding, poolings against their one-line definitions, and the layers behind them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distill.modules import Dense, Normalize, Pooling, StaticTable, Tokens

texts_of_tokens = st.lists(st.lists(st.integers(0, 1000), max_size=9), max_size=12)


def as_lists(tokens: Tokens) -> list[list[int]]:
    return [part.tolist() for part in torch.split(tokens.ids, tokens.lengths.tolist())]


@settings(deadline=None)
@given(texts_of_tokens, st.data())
def test_rows_are_the_texts_at_the_index(ids: list[list[int]], data: st.DataObject) -> None:
    tokens = Tokens.from_lists(ids)
    assert (len(tokens), as_lists(tokens)) == (len(ids), ids)
    places = data.draw(st.lists(st.integers(0, len(ids) - 1)) if ids else st.just([]))
    chosen = tokens.rows(torch.tensor(places, dtype=torch.long))
    assert as_lists(chosen) == [ids[place] for place in places]
    assert (chosen.ids.dtype, chosen.lengths.dtype) == (torch.int32, torch.int32)


@settings(deadline=None)
@given(texts_of_tokens, st.integers(1, 40))
def test_groups_hold_every_text_once_within_the_budget(ids: list[list[int]], budget: int) -> None:
    groups = list(Tokens.from_lists(ids).grouped(budget))
    order = [place for index, _ in groups for place in index.tolist()]
    assert sorted(order) == list(range(len(ids)))
    assert [text for _, tokens in groups for text in as_lists(tokens)] == [ids[place] for place in order]
    assert [len(ids[place]) for place in order] == sorted(map(len, ids))
    for _, tokens in groups:
        assert len(tokens) == 1 or len(tokens) * int(tokens.lengths.max()) <= budget


def test_unknown_pooling_modes_are_refused(unchecked: None) -> None:
    for modes in (["median"], []):
        with pytest.raises(ValueError, match=r"pooling modes are mean, cls.*got"):
            Pooling(8, modes)


# Pooling, one text (l, d) at a time

ORACLES = {
    "mean": lambda rows: rows.mean(0),
    "cls": lambda rows: rows[0],
    "lasttoken": lambda rows: rows[-1],
    "max": lambda rows: rows.amax(0),
    "mean_sqrt_len_tokens": lambda rows: rows.sum(0) / len(rows) ** 0.5,
    "weightedmean": lambda rows: sum(k * row for k, row in enumerate(rows, 1)) / sum(range(1, len(rows) + 1)),
}


def padded(lengths: list[int], side: str) -> tuple[Tensor, Tensor]:
    longest = max(lengths)
    places, counts = torch.arange(longest), torch.tensor(lengths)[:, None]
    mask = places < counts if side == "right" else places >= longest - counts
    return torch.randn(len(lengths), longest, 5, dtype=torch.float64), mask


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("mode", sorted(ORACLES))
@settings(deadline=None, max_examples=25)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_a_pooling_is_its_definition(mode: str, side: str, lengths: list[int]) -> None:
    hidden, mask = padded(lengths, side)
    expected = torch.stack([ORACLES[mode](rows[kept]) for rows, kept in zip(hidden, mask, strict=True)])
    torch.testing.assert_close(Pooling(5, [mode])(hidden, mask), expected, rtol=0, atol=1e-12)
    # What stands in the padding is never read.
    torch.testing.assert_close(Pooling(5, [mode])(hidden.masked_fill(~mask[..., None], 1e6), mask), expected)


def test_several_poolings_stand_side_by_side() -> None:
    hidden, mask = padded([3, 5], "right")
    both = Pooling(5, ["max", "cls"])
    assert both.width == 10
    assert torch.equal(both(hidden, mask), torch.cat([Pooling(5, [m])(hidden, mask) for m in ("max", "cls")], dim=1))


def test_half_precision_is_summed_in_full() -> None:
    hidden, mask = padded([4096], "right")
    pooled = Pooling(5)((hidden + 7).to(torch.bfloat16), mask)
    assert pooled.dtype == torch.float32
    assert (pooled - 7).abs().max() < 0.1


# Static table and head


@settings(deadline=None)
@given(texts_of_tokens)
def test_a_static_table_is_the_weighted_mean_of_its_rows(ids: list[list[int]]) -> None:
    table = StaticTable(torch.randn(1001, 4), torch.rand(1001))
    expected = [table.folded()[torch.tensor(text)].mean(0) if text else torch.zeros(4) for text in ids]
    found = table(Tokens.from_lists(ids))
    assert found.shape == (len(ids), 4)
    if ids:
        torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=1e-5)


def test_dense_is_linear_until_told_otherwise_and_zero_stays_zero() -> None:
    rows, dense = torch.randn(3, 4), Dense(4, 2)
    assert torch.equal(dense(rows), rows @ dense.linear.weight.T)
    assert torch.equal(Dense(4, 2, activation=torch.nn.Tanh())(torch.zeros(1, 4)), torch.zeros(1, 2))
    unit = Normalize()(torch.cat([rows, torch.zeros(1, 4)]))
    torch.testing.assert_close(unit.norm(dim=1), torch.tensor([1.0, 1.0, 1.0, 0.0]))
