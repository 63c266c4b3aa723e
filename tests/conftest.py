"""Shapes in distill's signatures are checked here and nowhere else: the hook must come before the first import."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import jaxtyping
import pytest
import torch

jaxtyping.install_import_hook("distill", "beartype.beartype")
torch.set_num_threads(1)  # as in the processes that tests start: the last bit of a product depends on the threads

LONGEST = ["test_recipes", "test_simulated_cuda", "test_training", "test_notebooks"]  # files, in minutes


def pytest_configure(config: pytest.Config) -> None:
    """No GPU unless it is asked for: the tests say the same on every machine, in two processes, too.

    With one: -m gpu, what needs it; -m "gpu or not slow", the others on it, too.
    """
    if "gpu" not in config.option.markexpr.replace("not gpu", ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: a file is one worker's, and what begins last is what the other workers wait for."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.fixture(autouse=True)
def torch_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """As users run it, without shape checks: what the function itself says about wrong shapes."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_model("bert", layers=2, pooling=["cls"])` is the folder that tests/tiny.py writes for it, once a session; read only."""
    import tiny

    made: dict[str, Path] = {}

    def make(kind: str, **options: object) -> Path:
        key = repr((kind, sorted(options.items())))
        if key not in made:
            made[key] = getattr(tiny, kind)(tmp_path_factory.mktemp("models") / kind, **options)
        return made[key]

    return make


@pytest.fixture(scope="session")
def tiny_bert(tiny_model: Callable[..., Path]) -> Path:
    """A teacher: 6 layers of width 32, mean, Normalize."""
    return tiny_model("bert")


@pytest.fixture(scope="session")
def tiny_bert_cls(tiny_model: Callable[..., Path]) -> Path:
    """First token, Dense(32, 24) with tanh, Normalize."""
    return tiny_model("bert_cls_dense")


@pytest.fixture(scope="session")
def tiny_mpnet(tiny_model: Callable[..., Path]) -> Path:
    """A teacher: 6 layers of width 32, relative positions, mean, Normalize."""
    return tiny_model("mpnet")


@pytest.fixture(scope="session")
def tiny_qwen(tiny_model: Callable[..., Path]) -> Path:
    """A decoder of 4 layers, last token, Normalize; pads on the right, and `tiny_qwen_left` on the left."""
    return tiny_model("qwen")


@pytest.fixture(scope="session")
def tiny_qwen_left(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("qwen", padding_side="left")
