"""Parameters, bytes, and texts a second."""

import time
from collections.abc import Mapping, Sequence

from distill import distributed
from distill.encoder import Encoder
from distill.students.summary import stored_bytes

FIRST, LARGEST = 8, 2048  # texts at a time
GOLDEN = 0.618033988749895  # its multiples, less their whole part, fill 0..1 evenly from the first few on


def speeds(
    encoders: Mapping[str, Encoder | Sequence[Encoder]], texts: Sequence[str], seconds: float = 0.5
) -> dict[str, dict[str, int | float]]:
    """Parameters, bytes as stored, and texts a second of one process, measured on the evaluation's own texts, after a warm-up.

    For about `seconds` each, in batches that grow; none is begun that would take much longer than what is left. All
    encoders take the texts in one order, in which the first few are as long as all are: a slow one reads no more than those.
    Several under one name read each text one after the other.
    """
    by_length = sorted(texts, key=len)
    mixed = [by_length[int((place + 0.5) * GOLDEN % 1 * len(texts))] for place in range(len(texts))]
    groups = {name: [one] if isinstance(one, Encoder) else list(one) for name, one in encoders.items()}
    rates = {
        name: 1 / sum(1 / _rate(one, mixed, seconds) for one in group) if distributed.is_main() else 0.0
        for name, group in groups.items()
    }
    return {
        name: {
            "parameters": sum(one.parameter_count for one in group),
            "bytes": sum(map(stored_bytes, group)),
            "texts_per_second": distributed.agree(rates[name]),
        }
        for name, group in groups.items()
    }


def _rate(encoder: Encoder, texts: Sequence[str], seconds: float) -> float:
    encoder.encode(texts[:1])
    size, done, began = FIRST, 0, time.perf_counter()
    while size:
        encoder.encode([texts[(done + i) % len(texts)] for i in range(size)])
        done, spent = done + size, time.perf_counter() - began
        left = int(done / spent * (seconds - spent))
        size = min(2 * size, LARGEST, left) if 4 * left > size else 0
    return done / spent
