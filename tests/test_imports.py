"""A module imports only what stands above it; geometry and objectives import little; importing does nothing."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import distill

ROOT = Path(distill.__file__).parent
ORDER = [
    "__main__",
    "errors",
    "files",
    "ahead",
    "similarity",
    "alignment",
    "streaming.kernels",  # needs Triton; `engine` imports it when a tile on CUDA comes
    "streaming.engine",
    "streaming.columns",
    "streaming.contrastive",
    "streaming.divergence",
    "streaming.twins",
    "streaming.joint",
    "streaming.moments",
    "streaming.pairs",
    "streaming.order",
    "streaming",
    "losses.pointwise",
    "losses.cross",
    "losses.relational",
    "losses.pairs",
    "losses.scores",
    "losses.temperature",
    "losses.combine",
    "losses",
    "heads",
    "metrics.classes",
    "metrics.ranks",
    "metrics.spaces",
    "metrics.intervals",
    "metrics.incremental",
    "metrics",
    "distributed",
    "run_lock",
    "runlog",
    "losses.sentence_transformers",  # an adapter to a trainer, not an objective: `losses` does not import it
    "model_files",
    "packages",
    "hub_errors",
    "hub",
    "quantized",
    "unpadded.context",
    "unpadded.places",
    "unpadded.linear",
    "unpadded.attention",
    "unpadded.trial",
    "unpadded",
    "modules",
    "folder",
    "head_folder",
    "beginnings",
    "texts",
    "encoder",
    "students.summary",
    "students.blocks",
    "students.projection",
    "students.choosing",
    "students.layers",
    "students.pruning",
    "students.pieces",
    "students.vocabulary",
    "students.token_table",
    "students.quantizing",
    "students.tiny",
    "students.from_model",
    "students",
    "tables.table",
    "tables.files",
    "tables.hub_data",
    "tables.sources",
    "tables",
    "data.texts",
    "data.pairs",
    "data.retrieval",
    "data.labelled",
    "data",
    "classes",
    "docstrings",
    "course",
    "store.compression",
    "store.shards",
    "store.rows",
    "store.vectors",
    "store.writing",
    "store.sharing",
    "store",
    "store.__main__",
    "scaling",
    "identity",
    "embed.job",
    "embed.places",
    "embed.taking",
    "embed",
    "embed.__main__",
    "joining.stores",
    "joining.methods",
    "joining.several",
    "joining",
    "teachers",
    "space",
    "narrow",
    "training.examples",
    "training.checkpoint",
    "training.sampling",
    "training.calibration",
    "training.stopping",
    "training.gradient_cache",
    "training.gradients",
    "training.finite",
    "training.settings",
    "training.execution",
    "training.acceleration",
    "training.averaging",
    "training.anchor",
    "training.table_rows",
    "training.optimizer",
    "training.mining",
    "training.feed",
    "training.loop",
    "training.labels",
    "training",
    "evaluation.closeup",
    "evaluation.scores",
    "evaluation.tasks",
    "evaluation.fidelity",
    "evaluation.speed",
    "evaluation.precisions",
    "evaluation.systems",
    "evaluation.mteb",
    "evaluation",
    "gates",
    "export.provenance",
    "export.card",
    "export.graphs",
    "export.onnx",
    "export.upload",
    "export.writing",
    "export",
    "export.__main__",
    "plots.frame",
    "plots.matrices",
    "plots.curves",
    "plots.circles",
    "plots",
    "page.charts",
    "page.words",
    "page.figures",
    "page.rendering",
    "page.run",
    "page.comparing",
    "page.writing",
    "page",
    "report",
    "truncation",
    "config.bounds",
    "config.loss",
    "config.teacher",
    "config.student",
    "config.evaluation",
    "config.join",
    "config.sides",
    "config",
    "planning.arithmetic",
    "planning.rehearsal",
    "planning.printing",
    "planning",
    "benchmark.measuring",
    "benchmark.naive",
    "benchmark.cases",
    "benchmark.arms",
    "benchmark.peers",
    "benchmark.seeds",
    "benchmark.encoding",
    "benchmark.stepping",
    "benchmark.reading",
    "benchmark",
    "manual",
    "recording",
    "cli",
    "verify_resume.comparing",
    "verify_resume",
    "verify_resume.__main__",
]
LIFTABLE = {name for name in ORDER if name.startswith(("losses", "streaming", "metrics"))} | {"similarity", "heads"}
LIFTABLE -= {"losses.sentence_transformers"}


def modules() -> dict[str, Path]:
    """Every module but the package itself, by its name below distill."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return {name: path for name, path in found.items() if name}


def imports(path: Path, known: set[str], *, top_level: bool = False) -> Iterator[str]:
    """Dotted names of what a file imports; `from distill import losses` is distill.losses."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name}:{node.lineno}: write the import from distill, not from a dot"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner.removeprefix("distill.") in known else str(node.module)


def test_every_module_has_a_place_in_the_order() -> None:
    assert sorted(set(modules()) - set(ORDER)) == []


@pytest.mark.parametrize("name", [name for name in ORDER if name in modules()])
def test_a_module_imports_only_what_stands_above_it(name: str) -> None:
    above = {f"distill.{other}" for other in ORDER[: ORDER.index(name)]}
    inside = {i for i in imports(modules()[name], set(modules())) if i.split(".")[0] == "distill"}
    assert sorted(inside - above) == []


@pytest.mark.parametrize("name", sorted(LIFTABLE & set(modules())))
def test_geometry_and_objectives_can_be_lifted(name: str) -> None:
    allowed = {"torch", "einops", "jaxtyping", "distill"} | sys.stdlib_module_names
    allowed |= {"triton"} if name == "streaming.kernels" else set()
    path, known = modules()[name], set(modules())
    assert {i.split(".")[0] for i in imports(path, known)} <= allowed
    assert {i.split(".")[0] for i in imports(path, known, top_level=True)} <= allowed


def test_the_walk_sees_an_import_from_below(tmp_path: Path) -> None:
    file = tmp_path / "bad.py"
    file.write_text("from distill import losses\ndef f():\n    import distill.cli\n    from torch import nn\n")
    assert list(imports(file, {"losses", "cli"})) == ["distill.losses", "distill.cli", "torch"]


def test_the_package_offers_the_same_names_to_programs_to_type_checkers_and_to_completion() -> None:
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    [checked] = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    homes = {alias.name: node.module for node in checked.body for alias in node.names}  # type: ignore[attr-defined]
    assert sorted(homes) == sorted(distill.__all__)
    assert set(distill.__all__) <= set(dir(distill))
    for name, home in homes.items():
        found = getattr(distill, name)
        whole = home if home != "distill" else f"distill.{name}"
        assert found is (sys.modules[whole] if home == "distill" else getattr(sys.modules[whole], name)), name
    with pytest.raises(AttributeError, match="no attribute 'encode'"):
        distill.encode  # noqa: B018


def test_the_package_names_its_commands() -> None:
    done = subprocess.run([sys.executable, "-m", "distill"], capture_output=True, text=True, timeout=120, check=True)
    named = re.findall(r"^  python -m distill\.(\w+) +\w", done.stdout, re.MULTILINE)
    starts = [name for name, path in modules().items() if '\nif __name__ == "__main__":' in path.read_text()]
    assert sorted(named) == sorted({name.removesuffix(".__main__") for name in starts} - {"__main__"})


def test_annotations_are_for_users_too() -> None:
    assert (ROOT / "py.typed").is_file()


def test_importing_prints_nothing_changes_no_seed_and_stays_light() -> None:
    program = """
import os, random, sys, warnings
import numpy, torch
state = lambda: (random.getstate(), str(numpy.random.get_state()), torch.get_rng_state().tolist(), dict(os.environ))
before = state()
import distill, distill.distributed, distill.heads, distill.losses, distill.metrics, distill.similarity
assert state() == before
heavy = {"transformers", "datasets", "matplotlib", "scipy", "beartype", "torch._dynamo", "distill.streaming.kernels"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
