"""AdamW of a static table at the cost of the rows that a step's texts use: the others wait until they are used again.

Dense AdamW moves every row at every step: by what is left of its last gradients, and by weight decay. What happens to a row
between two uses depends on it and on scalars of the steps in between alone, so that all of it can be made up for at once.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor
from torch.optim.adamw import adamw

from distill import distributed
from distill.ahead import sent
from distill.modules import StaticTable

WINDOW = 1024  # steps after which every row is brought up to date: none has to make up for more
BLOCK = 4096  # rows that are brought up to date at once, when all are
_LEAST = 1e-30  # of a sum that is divided by


class TableRows:
    """Updates a static table as AdamW does, and its running average, but each row when it is next used.

    A step: `lend`, the gradient of the module's `lent`, `exchange`, `update`; after the last one `finish`. `group` has AdamW's
    betas, eps, weight_decay and peak rate. Bias correction counts steps, not uses of a row.

    After step a, a row with moments m and v that is not used until after step b moves by -m * sum of w_s / (A_s sqrt(v) + eps)
    over the steps s between, whose w and A are scalars. Here it moves by -m / (sqrt(v) / W + eps / V), with V the sum of w_s
    and W that of w_s / A_s: the same but for rounding where eps is nothing beside sqrt(v), or all; where they are of one size,
    within 2e-3 of the row's way after 120 steps, the first of which differ most in A. Cost: O(d) a row used, and one pass over
    the table every 1,024 steps.

    Which rows a step uses and how long each has waited is known on the CPU: the host never waits for a device.
    """

    def __init__(self, module: StaticTable, group: Mapping[str, Any], average: Tensor | None = None):
        self.module, self.table, self.average = module, module.table.detach(), average
        self.peak, self.decay, self.eps = group["peak"], group["weight_decay"], group["eps"]
        self.betas: tuple[float, float] = group["betas"]
        self.moments: Float[Tensor, "2 v d"] = torch.zeros(2, *self.table.shape).to(self.table)
        self.last: Int[Tensor, " v"] = torch.zeros(len(self.table), dtype=torch.int32)
        self.waits = _Waits(self.betas, self.decay)
        module.table.requires_grad_(False)

    def lend(self, step: int, ids: Int[Tensor, " t"]) -> None:
        """Before step `step`, from 0: bring the rows of these tokens up to date, and have the module read them."""
        self._used = ids.long().unique()
        self._rows, self._moments, self._average = self._up_to_date(step, self._used)
        self.module.lend(self._here(self._used), self._rows)

    def exchange(self) -> None:
        """Mean over processes of the gradients: all have lent the same rows, those of the global batch."""
        if distributed.world_size() > 1:
            gradient = self._gradient()
            dist.all_reduce(gradient)
            gradient /= distributed.world_size()

    @torch.no_grad()
    def update(self, step: int, share: float, averaging: float = 0.0) -> None:
        """AdamW's step at this share of the peak rate; then the average goes the share `averaging` of its way to the table."""
        rate, gradient = self.peak * share, self._gradient()
        count = torch.full((), float(step), device=self.table.device)  # adamw counts this one itself
        adamw(
            *([self._rows], [gradient], [self._moments[0]], [self._moments[1]], [], [count]),
            fused=True,
            amsgrad=False,
            maximize=False,
            beta1=self.betas[0],
            beta2=self.betas[1],
            lr=rate,
            weight_decay=self.decay,
            eps=self.eps,
        )
        self.module.take_back()
        self.waits.step(step + 1, rate, averaging)
        if self._average is not None:
            self._average.lerp_(self._rows, averaging)
        self._put(step + 1, self._used, self._rows, self._moments, self._average)
        if (step + 1) % WINDOW == 0:
            self.finish(step + 1)

    @torch.no_grad()
    def finish(self, step: int) -> None:
        """Bring every row up to date, as before step `step`."""
        for rows in torch.arange(len(self.table)).split(BLOCK):
            self._put(step, rows, *self._up_to_date(step, rows))
        self.waits.begin(step)

    def give_back(self) -> None:
        """The table as it is: trained by whoever has it next, and read by all."""
        self.module.take_back()
        self.module.table.requires_grad_(True)

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds beside the table, whose rows stand as they were when they were last used."""
        return {"moments": self.moments, "last": self.last, "base": self.waits.base, "sums": self.waits.sums}

    def _gradient(self) -> Float[Tensor, "u d"]:
        lent = self.module.lent
        assert lent is not None
        assert lent.grad is not None
        return lent.grad

    def _here(self, tensor: Tensor) -> Tensor:
        return sent(tensor, self.table.device)

    @torch.no_grad()
    def _up_to_date(self, step: int, rows: Int[Tensor, " u"]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Vectors, moments and averages of rows as they are before step `step`."""
        last, here = self.last[rows], self._here(rows)
        missed = (step - last).double()
        decayed = [beta**missed for beta in self.betas]
        scalars = self._here(torch.stack([*self.waits.of(last, self.eps), *decayed]).to(self.table.dtype))
        kept, average_kept, inside, root, rest, average_root, average_rest, *decays = rearrange(scalars, "n u -> n u 1")
        table, moments = self.table[here], self.moments.index_select(1, here)
        roots = moments[1].sqrt()
        average = None
        if self.average is not None:
            average = self.average[here].mul_(average_kept).addcmul_(table, inside)
            average.addcdiv_(moments[0], torch.addcmul(average_rest, roots, average_root), value=-1)
        table.mul_(kept).addcdiv_(moments[0], torch.addcmul(rest, roots, root), value=-1)
        for moment, decay in zip(moments, decays, strict=True):
            moment.mul_(decay)
        return table, moments, average

    def _put(self, step: int, rows: Tensor, table: Tensor, moments: Tensor, average: Tensor | None) -> None:
        here = self._here(rows)
        self.table.index_copy_(0, here, table)
        self.moments.index_copy_(1, here, moments)
        self.last[rows] = step
        if self.average is not None and average is not None:
            self.average.index_copy_(0, here, average)


class _Waits:
    """What rows that are not used have to make up for: sums over the steps since step `base`, one for each step of last use.

    Column a holds, for a row that was up to date after a steps and has waited since: the share of it that weight decay has
    left; W and V of `TableRows`; the share of its average that is left, and how much of the row is in that by now; W and V of
    the average. In float64, on the CPU.
    """

    def __init__(self, betas: tuple[float, float], decay: float):
        self.betas, self.decay = betas, decay
        self.base = torch.zeros((), dtype=torch.int64)
        self.sums = torch.zeros(7, WINDOW + 1, dtype=torch.float64)
        self.begin(0)

    def begin(self, step: int) -> None:
        """All rows are up to date."""
        self.base.fill_(step)
        self.sums.zero_()
        self.sums[[0, 3], 0] = 1.0

    def step(self, step: int, rate: float, averaging: float) -> None:
        """Steps are counted from 1 here."""
        (beta1, beta2), now = self.betas, step - int(self.base)
        waited = np.arange(now, 0, -1)
        size, correction = rate / (1 - beta1**step), np.sqrt(1 - beta2**step)
        left, by_root, by_eps, average, inside, average_root, average_eps = self.sums.numpy()[:, :now]
        for part in (left, by_root, by_eps):
            part *= 1 - rate * self.decay
        by_root += size * correction * (beta1 / np.sqrt(beta2)) ** waited
        by_eps += size * beta1**waited
        average *= 1 - averaging
        for mean, part in ((inside, left), (average_root, by_root), (average_eps, by_eps)):
            mean += averaging * (part - mean)
        self.sums[[0, 3], now] = 1.0

    def of(self, last: Int[Tensor, " u"], eps: float) -> tuple[Float[Tensor, " u"], ...]:
        """Of rows by their step of last use: shares of row, average, and row in the average; 1 / W and eps / V of each of both."""
        left, by_root, by_eps, average, inside, average_root, average_eps = self.sums[:, last.long() - self.base]
        row, mean = (
            (1 / a.clamp(min=_LEAST), eps / b.clamp(min=_LEAST))
            for a, b in ((by_root, by_eps), (average_root, average_eps))
        )
        return left, average, inside, *row, *mean
