"""A student as one ONNX file that gives the vector: transformer, pooling, Dense and Normalize in one graph, or a table with its tokenizer.

A file has two inputs, `input_ids` and `attention_mask` (int64, batch x length, padded on the right), and one output,
`sentence_embedding` (float32, batch x width). Beside it stands tokenizer.json, set to cut and pad as the student does: what
ONNX Runtime needs of a student is the folder `onnx/`. optimum-onnx would do a part of this, and wants transformers 4.
"""

import importlib.util
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from tokenizers import Tokenizer
from torch import Tensor

from distill import files, metrics
from distill.encoder import Encoder
from distill.errors import NumericsError, RecipeError
from distill.export.graphs import graph
from distill.folder import UNLIMITED
from distill.modules import StaticTable
from distill.similarity import pairwise_cosine

FOLDER, FLOAT, INT8, MEASURED = "onnx", "student.onnx", "student-int8.onnx", "measured.json"
LARGEST_DIFFERENCE = 1e-4  # of a number of a unit vector, between the float32 file and the student
LEAST_COSINE = 0.9  # of an int8 file's vectors to the student's, on average: below, it is another model
LARGEST_BYTES = 2**31 - 2**27  # one protobuf file holds 2 GiB
BATCH = 16
Session = Callable[[dict[str, Any]], Any]  # inputs by name -> vectors (b, width), of numpy


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a file loses: its vectors beside the PyTorch student's, of the same texts.

    largest_difference: of any number of a vector, over the vector's length; cosine: of a text's two vectors, their mean and the lowest; overlap: share of a
    text's ten nearest others that stays, None for twenty texts or fewer.
    """

    file: str
    bytes: int
    texts: int
    largest_difference: float
    mean_cosine: float
    lowest_cosine: float
    overlap: float | None

    def __str__(self) -> str:
        overlap = "" if self.overlap is None else f", neighbour overlap@10 {self.overlap:.3f}"
        return (
            f"{self.file}: {self.bytes / 1e6:,.1f} MB; over {self.texts:,} texts numbers differ by {self.largest_difference:.1e} at most, "
            f"cosine {self.mean_cosine:.5f} on average, {self.lowest_cosine:.5f} at worst{overlap}"
        )


def export_onnx(student: Encoder, folder: str | Path, texts: Sequence[str], *, int8: bool = False) -> list[Measured]:
    """Write FOLDER/onnx/: student.onnx, with `int8` student-int8.onnx too, tokenizer.json, and measured.json, which is returned.

    `texts` are run through each file by ONNX Runtime and through the student. NumericsError, and no folder, if a number of
    a float32 vector differs by more than 1e-4, or if int8 vectors have a cosine below 0.9 to the student's. int8 is a quarter of the bytes: `_write_int8`. RecipeError without the extra `onnx`, and for a student beyond 2 GiB.
    Cost: the export, seconds a layer; one pass over the texts a file, and one of the student. One process calls it.
    """
    require_extra()
    if 4 * student.parameter_count > LARGEST_BYTES:
        raise RecipeError(
            f"{student.name} has {student.parameter_count / 1e6:,.0f}M parameters; an ONNX file holds 2 GiB, 480M of them."
        )
    target = Path(folder) / FOLDER
    reference = student.encode(texts)
    with files.published_folder(target) as temporary:
        _tokenizer(student).save(str(temporary / "tokenizer.json"))
        _write(student, temporary / FLOAT)
        names = [FLOAT]
        if int8:
            _write_int8(student, temporary / INT8)
            names.append(INT8)
        found = [_measure(temporary / name, texts, reference) for name in names]
        _refuse_broken(found)
        files.write_json(temporary / MEASURED, {one.file: asdict(one) for one in found})
    return found


def measured(folder: str | Path) -> list[Measured]:
    """What `export_onnx` measured of the files in FOLDER/onnx."""
    path = Path(folder) / FOLDER / MEASURED
    return [Measured(**one) for one in json.loads(path.read_text(encoding="utf-8")).values()] if path.exists() else []


def run(path: str | Path, texts: Sequence[str]) -> Float[Tensor, "n width"]:
    """Vectors of texts by ONNX Runtime and the tokenizer beside the file, on the CPU: all that a user of the file needs."""
    return opened(path)(texts)


def opened(
    path: str | Path, by: Callable[[Path], Session] | None = None
) -> Callable[[Sequence[str]], Float[Tensor, "n width"]]:
    """`run` for many calls: the file is read once, by ONNX Runtime with as many threads as torch has, or `by` another."""
    path = Path(path)
    tokenizer, session = Tokenizer.from_file(str(path.with_name("tokenizer.json"))), (by or _by_onnxruntime)(path)

    def vectors(texts: Sequence[str]) -> Float[Tensor, "n width"]:
        batches = (texts[start : start + BATCH] for start in range(0, len(texts), BATCH))
        return torch.cat([torch.from_numpy(session(_inputs(tokenizer, some))) for some in batches])

    return vectors


def _by_onnxruntime(path: Path) -> Session:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda inputs: session.run(None, inputs)[0]


def usage(name: str = FLOAT) -> str:
    """How a file is used without torch, from the folder that it lies in."""
    return (
        "import numpy, onnxruntime, tokenizers\n"
        'tokenizer = tokenizers.Tokenizer.from_file("onnx/tokenizer.json")\n'
        f'session = onnxruntime.InferenceSession("onnx/{name}")\n'
        'batch = tokenizer.encode_batch(["a query for the index you already have", "another one"])\n'
        'inputs = {"input_ids": [row.ids for row in batch], "attention_mask": [row.attention_mask for row in batch]}\n'
        "vectors = session.run(None, {name: numpy.array(rows, numpy.int64) for name, rows in inputs.items()})[0]"
    )


def absent() -> list[str]:
    """Packages of the extra `onnx` that are not installed."""
    return [name for name in ("onnx", "onnxruntime", "onnxscript") if importlib.util.find_spec(name) is None]


def require_extra() -> None:
    """RecipeError that names the extra to install, where one of its packages is not there."""
    if missing := absent():
        raise RecipeError(f'an ONNX file needs {", ".join(missing)}: pip install "distill[onnx]".')


def _refuse_broken(found: Sequence[Measured]) -> None:
    whole, *small = found
    if not whole.largest_difference <= LARGEST_DIFFERENCE:
        raise NumericsError(
            f"the vectors of {whole.file} differ from the student's by {whole.largest_difference:.1e}, at most "
            f"{LARGEST_DIFFERENCE:.0e} is allowed; nothing was written."
        )
    for one in small:
        if not one.mean_cosine >= LEAST_COSINE:
            raise NumericsError(
                f"the vectors of {one.file} have cosine {one.mean_cosine:.3f} to the student's, at least {LEAST_COSINE} is asked; "
                "nothing was written. Leave out --int8: this student loses too much in whole numbers."
            )


def _write(student: Encoder, path: Path, *, int8: bool = False, named: bool = False) -> None:
    """The graph, with batch and length left open; `named`: with what the exporter notes on each node."""
    ids, mask = torch.full((2, 6), 1), torch.ones(2, 6, dtype=torch.int64)
    mask[1, 4:] = 0
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            graph(student, int8=int8),
            (ids, mask),
            dynamo=True,
            verbose=False,
            input_names=["input_ids", "attention_mask"],
            output_names=["sentence_embedding"],
            dynamic_shapes={"input_ids": axes, "attention_mask": axes},
        )
        assert program is not None
        program.save(path, external_data=False)
    if not named:
        _strip(path)


def _write_int8(student: Encoder, path: Path) -> None:
    """Token table and Dense layers as int8 with one scale a row; in a transformer's products, both sides are whole numbers.

    There its weights have one scale a column, and what they are multiplied by is brought to uint8 as it comes, one scale a
    batch: what the texts beside a text change of its vector is part of the error.
    """
    if isinstance(student.backbone, StaticTable):
        return _write(student, path, int8=True)
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    rows = path.with_name("rows.onnx")
    _write(student, rows, int8=True, named=True)
    head = [node.name for node in onnx.load(rows).graph.node if _in_head(node)]
    # uint8: where a processor has no VNNI (AVX2 alone), sums of uint8 * int8 saturate; a real student then kept cosine 0.11.
    options: dict[str, Any] = {"per_channel": True, "weight_type": QuantType.QUInt8, "nodes_to_exclude": head}
    with _quiet():
        quantize_dynamic(rows, path, op_types_to_quantize=["MatMul", "Gemm"], **options)
    rows.unlink()
    _strip(path)


def _strip(path: Path) -> None:
    """Take the exporter's notes out of a file: names of modules, and the paths of sources on this machine."""
    import onnx

    model = onnx.load(path)
    for part in (model.graph, *model.graph.node, *model.graph.input, *model.graph.output, *model.graph.value_info):
        del part.metadata_props[:]
        part.doc_string = ""
    onnx.save(model, path)


def _in_head(node: Any) -> bool:
    """Whether a node was made by a layer behind the pooling: the exporter keeps the names of modules."""
    return any("'head'" in entry.value for entry in node.metadata_props if entry.key.endswith("name_scopes"))


def _tokenizer(student: Encoder) -> Tokenizer:
    """The student's tokenizer, which cuts at its max_length and pads on the right."""
    static = isinstance(student.backbone, StaticTable)
    core = student.tokenizer if static else student.tokenizer.backend_tokenizer
    state = json.loads(core.to_str())
    if static:
        state["post_processor"] = None  # a table reads no special tokens around a text
    if student.lowercase:
        steps = [{"type": "Lowercase"}, *([state["normalizer"]] if state["normalizer"] else [])]
        state["normalizer"] = {"type": "Sequence", "normalizers": steps}
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.no_truncation()
    if student.max_length < UNLIMITED:
        tokenizer.enable_truncation(
            student.max_length, direction=getattr(student.tokenizer, "truncation_side", "right")
        )
    pad = 0 if isinstance(student.backbone, StaticTable) else student.backbone.pad_id
    tokenizer.enable_padding(pad_id=pad, pad_token=tokenizer.id_to_token(pad) or "[PAD]", direction="right")
    return tokenizer


def _inputs(tokenizer: Tokenizer, texts: Sequence[str]) -> dict[str, Any]:
    rows = tokenizer.encode_batch(list(texts))
    both = {"input_ids": [row.ids for row in rows], "attention_mask": [row.attention_mask for row in rows]}
    return {name: torch.tensor(value, dtype=torch.int64).reshape(len(rows), -1).numpy() for name, value in both.items()}


def _measure(path: Path, texts: Sequence[str], reference: Float[Tensor, "n width"]) -> Measured:
    found = run(path, texts)
    length = reference.norm(dim=1, keepdim=True).clamp(min=1e-9)
    cosine = pairwise_cosine(found, reference)[reference.any(dim=1)]
    return Measured(
        file=path.name,
        bytes=path.stat().st_size,
        texts=len(texts),
        largest_difference=float(((found - reference) / length).abs().max()),
        mean_cosine=float(cosine.mean()),
        lowest_cosine=float(cosine.min()),
        overlap=float(metrics.neighbour_overlap(found, reference, 10).mean()) if len(texts) > 20 else None,
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on torchvision and on shapes, which say nothing of the student."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(before)
