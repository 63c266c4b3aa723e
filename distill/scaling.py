"""What a corpus of any size takes on any number of GPUs, from arithmetic: bytes, seconds, collectives.

python -m distill.scaling --texts 1e9 --gpus 8 64

Nothing is measured here. Rates of devices and links are what `--flops` and `--links` say.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from distill.errors import reported
from distill.store import Format
from distill.store.shards import SHARD_ROWS

# Bytes of host memory a row: of an open store (key, token count, flag), of its index, once something is looked up (order and
# sorted keys), and of a run (row number, short key, token count; the orders of texts and of bank rows of two epochs each).
STORE_ROW, INDEX_ROW, RUN_ROW = 16 + 4 + 1, 8 + 16, 8 + 8 + 4 + 4 * 8
TEXT_OBJECT = 57  # bytes of a Python text beside its characters, and of its place in a list


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A corpus, a teacher, a student and its steps. Parameters are those that every token goes through: not the token table."""

    texts: float = 1e9
    tokens: float = 30.0
    """A text."""
    characters: float = 130.0
    """A text."""
    width: int = 768
    teacher_parameters: float = 85e6
    student_parameters: float = 21.3e6
    student_table: float = 23.4e6
    """Of its token table, which is not trained."""
    batch: int = 8192
    """Texts a step over all GPUs."""
    bank: int = 65_536
    store_as: str = "float16"


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """GPUs, one process each; what one reaches in floating point operations, and its share of the link, bytes a second."""

    gpus: int
    flops: float
    link: float

    @property
    def name(self) -> str:
        return f"{self.gpus} GPU{'s' if self.gpus > 1 else ''}"


def estimate(workload: Workload, cluster: Cluster) -> dict[str, str]:
    """Each thing that a run needs, in words."""
    vectors = workload.texts * (Format.parse(workload.store_as).row_bytes(workload.width) + 21)
    host = workload.texts * (STORE_ROW + INDEX_ROW + RUN_ROW + 4 * workload.tokens + TEXT_OBJECT + workload.characters)
    steps = math.ceil(workload.texts / workload.batch)
    once, parts = (
        2 * workload.teacher_parameters * workload.tokens * workload.texts / cluster.flops / cluster.gpus,
        step(workload, cluster),
    )
    trained = 4 * workload.student_parameters
    return {
        "teacher vectors on disk": f"{size(vectors)} in {math.ceil(workload.texts / SHARD_ROWS):,} shards",
        "written by each process": f"{size(vectors / cluster.gpus)}, {size(vectors / cluster.gpus / once)}/s",
        "the teacher, once": time(once),
        "host memory of each process": size(host),
        "a pass over the texts": f"{steps:,} steps of {workload.batch:,}",
        "a step: student, forward and backward": milliseconds(parts["student"]),
        "a step: the loss's products": milliseconds(parts["loss"]),
        f"a step: all-reduce of gradients, {size(trained)}": milliseconds(parts["gradients"]),
        f"a step: all-gather of teacher rows, {size(4.0 * workload.batch * workload.width)}": milliseconds(
            parts["rows"]
        ),
        "a step: read by each process": f"{workload.batch // cluster.gpus + workload.bank:,} rows, {size(read(workload, cluster))}",
        "a pass, nothing overlapped": time(steps * sum(parts.values())),
        "reading for that": f"{size(read(workload, cluster) / sum(parts.values()))}/s a process",
        "a checkpoint": size(4 * workload.student_table + 3 * trained),
    }


def step(workload: Workload, cluster: Cluster) -> dict[str, float]:
    """Seconds of the parts of a step. A ring moves 2 (n - 1) / n of what is reduced, and half of that of what is gathered.

    The table is not trained: no gradient of it is computed or sent. Of a contrastive or KL term over student x (teacher and
    bank) 3 products are counted, of this process's rows.
    """
    mine, ring = workload.batch / cluster.gpus, (cluster.gpus - 1) / cluster.gpus
    return {
        "student": 6 * workload.student_parameters * workload.tokens * mine / cluster.flops,
        "loss": 3 * 2 * mine * (workload.batch + workload.bank) * workload.width / cluster.flops,
        "gradients": 2 * ring * 4 * workload.student_parameters / cluster.link,
        "rows": ring * 4 * workload.batch * workload.width / cluster.link,
    }


def read(workload: Workload, cluster: Cluster) -> float:
    """Bytes of stored vectors a step of a process: its share of the batch, and the bank, which is the same everywhere."""
    return (workload.batch / cluster.gpus + workload.bank) * Format.parse(workload.store_as).row_bytes(workload.width)


def table(workload: Workload, clusters: Sequence[Cluster]) -> str:
    """In Markdown, a column for each cluster. What a row says in all of them is said once."""
    columns = [estimate(workload, cluster) for cluster in clusters]
    lines = [["", *(cluster.name for cluster in clusters)], ["---"] * (1 + len(clusters))]
    lines += [[name, *(column[name] for column in columns)] for name in columns[0]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def size(count: float) -> str:
    power = min(5, int(math.log(max(count, 1), 1000)))
    return f"{count / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB', 'PB')[power]}"


def time(seconds: float) -> str:
    for name, length in (("days", 86_400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.3g} {name}"
    return f"{seconds:.3g} s"


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.2g} ms"


def main(arguments: Sequence[str] | None = None) -> int:
    workload = Workload()
    parser = argparse.ArgumentParser(prog="python -m distill.scaling", description=(__doc__ or "").partition("\n")[0])
    for name, kind in (("texts", float), ("tokens", float), ("characters", float), ("batch", int), ("bank", int)):
        parser.add_argument(f"--{name}", type=kind, default=getattr(workload, name), help="%(default)g")
    for name in ("teacher_parameters", "student_parameters", "student_table"):
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=float, default=getattr(workload, name), help="%(default)g"
        )
    parser.add_argument("--width", type=int, default=workload.width, help="of the teacher's vectors; %(default)d")
    parser.add_argument("--store-as", default=workload.store_as, help="float16, int8, pca-K, pca-K-int8; %(default)s")
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--flops", type=float, default=3e14, help="that a GPU reaches; %(default)g")
    parser.add_argument(
        "--links", type=float, nargs="+", default=[3e11, 4e10], help="bytes a second, one for each of --gpus"
    )
    given = vars(parser.parse_args(arguments))
    gpus, flops, links = given.pop("gpus"), given.pop("flops"), given.pop("links")
    numbers = [*gpus, *links, flops, *(value for value in given.values() if value != given["store_as"])]
    if not all(0 < number < math.inf for number in numbers):
        parser.error("numbers are above 0 and finite")
    if len(links) != len(gpus):
        parser.error(f"--links are as many as --gpus: {len(gpus)}, got {len(links)}; give both")
    clusters = [Cluster(gpus=count, flops=flops, link=link) for count, link in zip(gpus, links, strict=True)]
    return reported(partial(_print, Workload(**given), clusters))


def _print(workload: Workload, clusters: Sequence[Cluster]) -> int:
    print(table(workload, clusters))
    return 0


if __name__ == "__main__":
    sys.exit(main())
