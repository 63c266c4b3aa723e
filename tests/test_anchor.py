"""The pull to the start against its formula, and against a table that is free."""

import pytest
import torch
from torch import nn

from distill.training.anchor import TableAnchor


def test_each_row_goes_its_share_of_the_way_back() -> None:
    table = nn.Parameter(torch.randn(4, 3, dtype=torch.float64))
    anchor = TableAnchor(table, torch.tensor([0, 0, 0, 2], dtype=torch.int32), strength=2.0)
    start = table.detach().clone()
    moved = start + torch.randn_like(start)
    table.data.copy_(moved)
    anchor.pull(0.1)
    for row, count in enumerate([3, 0, 1, 0]):
        share = 0.1 * 2.0 / (1 + count)
        torch.testing.assert_close(table[row].detach(), (1 - share) * moved[row] + share * start[row])
    assert torch.equal(anchor.start, start)


def test_a_strong_pull_goes_back_and_no_further() -> None:
    table = nn.Parameter(torch.zeros(2, 3))
    anchor = TableAnchor(table, torch.tensor([0] * 99), strength=1000.0)
    table.data.fill_(8.0)
    anchor.pull(0.01)
    assert torch.equal(table[1], torch.zeros(3))
    torch.testing.assert_close(table[0].detach(), torch.full((3,), 8 * 0.9))


def test_a_row_that_did_not_move_is_left_in_every_bit() -> None:
    table = nn.Parameter(torch.randn(5, 7))
    anchor, before = TableAnchor(table, torch.tensor([1, 1]), strength=30.0), table.detach().clone()
    anchor.pull(0.01)
    anchor.pull(0.02)
    assert torch.equal(table, before)


def test_adam_carries_a_rare_row_nearly_as_far_as_a_common_one_and_the_pull_brings_it_back() -> None:
    """Row 0 is in every step, row 1 in one of 20; targets are noise."""

    def distances(strength: float | None) -> tuple[float, float]:
        torch.manual_seed(0)
        table = nn.Parameter(torch.zeros(2, 16))
        adam = torch.optim.AdamW([table], lr=0.01, weight_decay=0.0)
        ids = [row for step in range(200) for row in ([0, 1] if step % 20 == 0 else [0])]
        anchor = TableAnchor(table, torch.tensor(ids), strength=strength) if strength else None
        for step in range(200):
            adam.zero_grad()
            rows = table[:2] if step % 20 == 0 else table[:1]
            (rows * torch.randn_like(rows)).sum().backward()
            adam.step()
            if anchor:
                anchor.pull(0.01)
        common, rare = table.detach().norm(dim=1).tolist()
        return common, rare

    free, pulled = distances(None), distances(30.0)
    assert free[1] > 0.5 * free[0]
    assert pulled[1] < 0.7 * free[1]
    assert pulled[0] > 0.8 * free[0]


@pytest.mark.parametrize("strength", [0.0, -1.0, float("nan"), float("inf")])
def test_a_strength_that_does_not_pull_is_refused(strength: float) -> None:
    with pytest.raises(ValueError, match="strength above 0, got"):
        TableAnchor(nn.Parameter(torch.zeros(2, 2)), torch.tensor([0]), strength=strength)
