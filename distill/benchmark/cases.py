"""Rows that are easy or hard for a loss."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distill.benchmark.naive import ALL, NAIVE, WITH_BANK, Batch

# What the rows of the data give as loss, or come nearest to. The hinge cannot fall below what pairs closer than its margin give.
LOSS = {"easy": 1e-4, "hard": 1e-9}
EASY_HINGE = 1e-2
HARD_TEMPERATURE = 0.01


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is computed, by whichever arm."""

    loss: str
    rows: int
    columns: int
    width: int
    temperature: float
    dtype: str
    data: str
    repeats: int
    noise: float = 0.0

    def batch(self, device: torch.device) -> Batch:
        """Columns are random; the student's rows are their teachers' and `noise` times as long random ones."""
        return self.noisy(*self.draw(device))

    def draw(self, device: torch.device) -> tuple[Tensor, Tensor]:
        generator = torch.Generator(device).manual_seed(0)
        sizes = (self.columns, self.width), (self.rows, self.width)
        columns, noise = (torch.randn(size, generator=generator, device=device) for size in sizes)
        return columns, noise

    def noisy(self, columns: Tensor, noise: Tensor) -> Batch:
        dtype = getattr(torch, self.dtype)
        student = (columns[: self.rows] + self.noise * noise).to(dtype).requires_grad_()
        return Batch(student, columns.to(dtype), self.temperature)

    def tuned(self, device: torch.device) -> "Case":
        """With the noise that gives the loss that its data asks for, or comes nearest to it."""
        rows = min(64, self.rows)
        few = replace(self, rows=rows, columns=self.columns if self.loss in WITH_BANK else rows, dtype="float64")
        drawn = few.draw(device)
        wanted = EASY_HINGE if (self.loss, self.data) == ("rank_hinge", "easy") else LOSS[self.data]
        low, high = math.log(1e-5), math.log(3)
        for _ in range(12):
            middle = (low + high) / 2
            with torch.no_grad():
                value = NAIVE[self.loss](replace(few, noise=math.exp(middle)).noisy(*drawn), ALL)
            low, high = (low, middle) if value > wanted else (middle, high)
        return replace(self, noise=math.exp(low))
