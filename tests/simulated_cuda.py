"""A CUDA device that is none: what runs on a GPU is tried without one, with a torch that was built for CPUs.

    library=$(python tests/simulated_cuda.py)
    SIMULATED_CUDA=$library PYTHONPATH=tests pytest -p simulated_cuda -m "gpu or not slow"

Tensors of `cuda:0` have the host's memory, and operators run on the CPU (simulated_cuda.cpp). What is true to a GPU: a tensor
of the CPU and one of the device do not mix, memory that was not written is not 0, pinned memory is told from other memory, what
makes the host wait is seen by torch.cuda.set_sync_debug_mode, and flash attention takes what it takes. What is not: speed,
memory, a GPU's order of sums, Triton, and anything done at the same time as something else.

As a plugin it has to be imported before torch is.
"""

import ctypes
import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any


def torch_folder() -> Path:
    spec = find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def build(folder: Path) -> Path:
    """Compile the device against the installed torch: ten seconds."""
    source, library, torch = Path(__file__).with_suffix(".cpp"), folder / "simulated_cuda.so", torch_folder()
    includes = [f"-I{torch / 'include'}", f"-I{torch / 'include/torch/csrc/api/include'}"]
    libraries = [f"-L{torch / 'lib'}", "-lc10", "-ltorch_cpu", "-ltorch"]
    options = ["-O1", "-std=c++20", "-shared", "-fPIC"]
    subprocess.run(["g++", *options, *includes, str(source), "-o", str(library), *libraries], check=True)
    return library


def install(library: Path) -> None:
    """Give this process the device. Torch asks for one once, when it is loaded."""
    assert "torch" not in sys.modules
    for name in ("libtorch_global_deps.so", "libc10.so", "libtorch_cpu.so", "libtorch.so"):
        ctypes.CDLL(str(torch_folder() / "lib" / name), mode=ctypes.RTLD_GLOBAL)
    device = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    import torch

    modes = {"default": 0, "warn": 1, "error": 2}
    told = {
        "is_available": True,
        "is_initialized": True,
        "is_bf16_supported": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_capability": (9, 0),
        "get_device_name": "simulated",
        "get_device_properties": SimpleNamespace(name="simulated", major=9, minor=0, total_memory=8 << 30),
        "mem_get_info": (8 << 30, 8 << 30),
        "memory_allocated": 1 << 20,
        "max_memory_allocated": 1 << 20,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
        "_is_in_bad_fork": False,
    }
    done = ("_lazy_init", "set_device", "synchronize", "empty_cache", "ipc_collect", "reset_peak_memory_stats")
    for name, value in {**told, **dict.fromkeys((*done, "manual_seed", "manual_seed_all"))}.items():
        setattr(torch.cuda, name, lambda *_, value=value, **__: value)
    torch.cuda.get_rng_state = lambda device=0: torch.get_rng_state()  # it has no generator of its own
    torch.cuda.set_rng_state = lambda state, device=0: None  # type: ignore[assignment]
    torch.cuda.set_sync_debug_mode = lambda mode: device.simulated_waiting(modes[str(mode)])
    _add_flash_attention(torch, device)


def _add_flash_attention(torch: Any, device: ctypes.CDLL) -> None:
    """What `torch.nn.attention.varlen` calls, text by text."""

    def forward(query, key, value, edges, key_edges, longest, longest_key, dropout, causal, debug, **options):  # type: ignore[no-untyped-def]
        _check(torch, query, key, value, edges, key_edges, longest, longest_key)
        outputs, sums = [], []
        for q, k, v in _texts(edges, query, key, value):
            scores = _scores(torch, q, k, causal, options)
            sums.append(scores.logsumexp(-1))
            outputs.append((scores.softmax(-1) @ v.repeat_interleave(len(q) // len(k), 0)).transpose(0, 1))
        none = torch.empty(0, device=query.device)
        return torch.cat(outputs).to(query.dtype), torch.cat(sums, 1), none, none, none

    def backward(  # type: ignore[no-untyped-def]
        gradient,
        query,
        key,
        value,
        output,
        sums,
        edges,
        key_edges,
        longest,
        longest_key,
        dropout,
        causal,
        *_,
        **options,
    ):
        _check(torch, query, key, value, edges, key_edges, longest, longest_key)
        assert gradient.dtype == output.dtype == query.dtype
        scale = query.shape[-1] ** -0.5 if options["scale"] is None else options["scale"]
        found = []
        for g, q, k, v, o in _texts(edges, gradient, query, key, value, output):
            groups = len(q) // len(k)
            p = _scores(torch, q, k, causal, options).softmax(-1)
            wide_k, wide_v = (part.repeat_interleave(groups, 0) for part in (k, v))
            of_scores = scale * p * (g @ wide_v.transpose(1, 2) - (g * o).sum(-1, keepdim=True))
            of_keys, of_values = of_scores.transpose(1, 2) @ q, p.transpose(1, 2) @ g
            shared = (part.unflatten(0, (-1, groups)).sum(1) for part in (of_keys, of_values))
            found.append([part.transpose(0, 1).to(query.dtype) for part in (of_scores @ wide_k, *shared)])
        return tuple(torch.cat(parts) for parts in zip(*found, strict=True))

    def on_device(function):  # type: ignore[no-untyped-def]
        def call(*arguments, **options):  # type: ignore[no-untyped-def]
            device.simulated_inside(1)
            try:
                return function(*arguments, **options)
            finally:
                device.simulated_inside(0)

        return call

    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", on_device(forward), "CUDA")
    library.impl("_flash_attention_backward", on_device(backward), "CUDA")
    _KEPT.append(library)  # which takes its functions back when it goes


_KEPT: list[Any] = []


def _check(torch, query, key, value, edges, key_edges, longest, longest_key) -> None:  # type: ignore[no-untyped-def]
    """What the kernel asks of its arguments, and would not always say."""
    for part in (query, key, value):
        assert part.is_cuda
        assert part.dtype in (torch.float16, torch.bfloat16)
        assert part.ndim == 3
        assert part.stride(-1) == 1
        assert part.shape[-1] % 8 == 0
        assert part.shape[-1] <= 256
    for some, most in ((edges, longest), (key_edges, longest_key)):
        assert some.is_cuda
        assert some.dtype == torch.int32
        assert some.is_contiguous()
        assert some[0] == 0
        assert some[-1] == len(query) == len(key) == len(value)
        assert int(some.diff().max()) <= most
    assert key.shape == value.shape
    assert query.shape[1] % key.shape[1] == 0


def _texts(edges, *parts):  # type: ignore[no-untyped-def]
    """Of each text: heads x tokens x width, in float32."""
    places = edges.tolist()
    for first, last in pairwise(places):
        yield [part[first:last].float().transpose(0, 1) for part in parts]


def _scores(torch, q, k, causal, options):  # type: ignore[no-untyped-def]
    scale = q.shape[-1] ** -0.5 if options["scale"] is None else options["scale"]
    left, right = options["window_size_left"], 0 if causal else options["window_size_right"]
    place = torch.arange(q.shape[1], device=q.device)
    behind = place[:, None] - place
    hidden = ((left >= 0) & (behind > left)) | ((right >= 0) & (-behind > right))
    return (scale * q @ k.repeat_interleave(len(q) // len(k), 0).transpose(1, 2)).masked_fill(hidden, float("-inf"))


if __name__ == "__main__":
    print(build(Path(tempfile.mkdtemp())))
elif "SIMULATED_CUDA" in os.environ:
    install(Path(os.environ["SIMULATED_CUDA"]))
