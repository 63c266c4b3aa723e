"""Parameters, bytes, and texts a second."""

import time
from collections.abc import Mapping, Sequence

from distill import distributed
from distill.encoder import Encoder


def speeds(
    encoders: Mapping[str, Encoder], texts: Sequence[str], seconds: float = 1.0
) -> dict[str, dict[str, int | float]]:
    """Parameters, bytes, and texts a second of one process, measured on the evaluation's own texts, after a warm-up."""
    rates = {
        name: _rate(encoder, texts, seconds) if distributed.is_main() else 0.0 for name, encoder in encoders.items()
    }
    return {
        name: {
            "parameters": encoder.parameter_count,
            "bytes": 4 * encoder.parameter_count,
            "texts_per_second": distributed.agree(rates[name]),
        }
        for name, encoder in encoders.items()
    }


def _rate(encoder: Encoder, texts: Sequence[str], seconds: float) -> float:
    size, done = 8, 0
    encoder.encode(texts[:size])
    began = time.perf_counter()
    while (spent := time.perf_counter() - began) < seconds:
        encoder.encode([texts[(done + i) % len(texts)] for i in range(size)])
        done, size = done + size, min(2 * size, 2048)
    return done / spent
