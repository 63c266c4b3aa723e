"""Shapes in distill's signatures are checked here and nowhere else: the hook must come before the first import."""

from collections.abc import Iterator

import jaxtyping
import pytest
import torch

jaxtyping.install_import_hook("distill", "beartype.beartype")


@pytest.fixture(autouse=True)
def torch_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """As users run it, without shape checks: what the function itself says about wrong shapes."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
