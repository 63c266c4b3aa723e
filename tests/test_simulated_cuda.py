"""What needs a GPU, without one: the tests marked gpu, and those of training and embedding, on a simulated device.

All of it: pytest -m "slow or not slow" tests/test_simulated_cuda.py
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import simulated_cuda
import torch
from packaging.version import Version

TESTS = Path(__file__).parent
pytestmark = pytest.mark.timeout(3000)
HEADERS = (2, 13)  # of the torch that simulated_cuda.cpp is written against


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    if torch.version.cuda or torch.version.hip:
        pytest.skip("this torch was built for real devices")
    if Version(torch.__version__).release[:2] != HEADERS or sys.platform != "linux" or not shutil.which("g++"):
        pytest.skip(f"needs Linux, g++ and torch {'.'.join(map(str, HEADERS))}")
    library = simulated_cuda.build(tmp_path_factory.mktemp("simulated"))
    return {
        **{name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"},  # for the run around it
        "SIMULATED_CUDA": str(library),
        "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]),
    }


def run(environment: dict[str, str], *command: str) -> str:
    ran = subprocess.run(
        [sys.executable, *command], env=environment, cwd=TESTS.parent, capture_output=True, text=True, timeout=2400
    )
    assert ran.returncode == 0, ran.stdout[-20_000:] + ran.stderr[-5_000:]
    return ran.stdout


MAIN_JOB = ["labels", "table_rows", "training", "unpadded"]
WHAT_IT_STANDS_ON = pytest.param(["embed", "encoder", "gradient_cache", "heads", "mining"], marks=pytest.mark.slow)
ELSEWHERE = "two_independent_processes or killed_build or killed_compressed_build or launcher or real_teachers"


@pytest.mark.parametrize("rows", ["not 3000", pytest.param("3000", marks=pytest.mark.slow)])  # minutes on a CPU
def test_what_needs_a_gpu_passes(environment: dict[str, str], rows: str) -> None:
    files = [str(path) for path in TESTS.glob("test_*.py") if "pytest.mark.gpu" in path.read_text()]
    assert " passed" in run_tests(environment, "-m", "gpu", "-k", rows, *files)


@pytest.mark.parametrize("names", [MAIN_JOB, WHAT_IT_STANDS_ON])
def test_the_main_job_passes(environment: dict[str, str], names: list[str]) -> None:
    files = [str(TESTS / f"test_{name}.py") for name in names]
    assert " passed" in run_tests(environment, "-m", "not gpu and not slow", "-k", f"not ({ELSEWHERE})", *files)


def run_tests(environment: dict[str, str], *options: str) -> str:
    return run(environment, "-m", "pytest", "-p", "simulated_cuda", "-p", "no:cacheprovider", "-n", "0", "-q", *options)


def test_the_device_is_as_strict_as_a_real_one(environment: dict[str, str]) -> None:
    run(
        environment,
        "-c",
        """
import simulated_cuda
import torch
from distill import distributed

assert distributed.device().type == "cuda"
there, here = torch.ones(3, device="cuda"), torch.ones(3)
assert there.is_cuda and (there + there).is_cuda and there[1:].is_cuda and torch.equal((there + 1).cpu(), here + 1)
for mixed in (lambda: there + here, lambda: torch.cat([there, here]), lambda: there @ here, lambda: torch.equal(there, here)):
    try:
        mixed()
    except RuntimeError as error:
        assert "same device" in str(error), error
    else:
        raise AssertionError("a tensor of the CPU and one of the device were mixed")
assert (2 * there + torch.tensor(1.0)).is_cuda  # numbers of the CPU may be
assert here.pin_memory().is_pinned() and not here.is_pinned()
assert not torch.equal(torch.empty(3, device="cuda").cpu(), torch.zeros(3))
torch.cuda.set_sync_debug_mode("error")
for waits in (there.cpu, there.sum().item, there.nonzero, lambda: there[there > 0], lambda: here.to("cuda"), lambda: bool(there[0])):
    try:
        waits()
    except RuntimeError as error:
        assert "synchronizing" in str(error), error
    else:
        raise AssertionError("the host waited unseen")
here.to("cuda", non_blocking=True), there.sum(), there.sort(), there.clone().fill_(1.0), torch.full((), 2.0, device="cuda")
""",
    )
