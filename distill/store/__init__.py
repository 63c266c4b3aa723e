"""Teacher vectors on disk: sharded, keyed, checked, memory-mapped. A teacher runs once per text in the life of a project.

A store is a folder: safetensors shards of at most 65,536 rows and a manifest.json, written last, that lists them with
their sha256. A row is a vector (float16, or as `compression` has it), the 128-bit key of (kind, prompt, exact text), a token
count and a flag. Rows are found by key, never by number. The fingerprint says which encoder made the vectors; another one
is never read by accident.

    python -m distill.store info PATH          what is in it, and what compression cost
    python -m distill.store verify PATH        whether every file is what was written
    python -m distill.store repair PATH        take damaged shards out; embed() computes only their rows anew
    python -m distill.store compress PATH NEW --as int8     the same rows as int8, pca-256 or pca-256-int8
    python -m distill.store export PATH FILE.parquet --texts TEXTS      the same rows for others: text, key, vector
"""

from distill.store.compression import Distortion, Format
from distill.store.rows import FLAG_NAMES, GOOD, NO_TOKENS, NOT_FINITE, ZERO, Rows, packed, text_keys
from distill.store.shards import verify
from distill.store.sharing import write_parquet
from distill.store.vectors import Store
from distill.store.writing import compress, write_store

__all__ = [
    "FLAG_NAMES",
    "GOOD",
    "NOT_FINITE",
    "NO_TOKENS",
    "ZERO",
    "Distortion",
    "Format",
    "Rows",
    "Store",
    "compress",
    "packed",
    "text_keys",
    "verify",
    "write_parquet",
    "write_store",
]
