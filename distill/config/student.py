"""The flags --student.*, and the student they build."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from distill import distributed, students
from distill.config.bounds import at_least
from distill.config.teacher import fetch
from distill.embed import embed, embed_vocabulary
from distill.encoder import Encoder
from distill.errors import RecipeError
from distill.modules import StaticTable
from distill.narrow import narrow, require_narrower
from distill.quantized import TableFormat
from distill.similarity import evenly_spaced
from distill.space import Space
from distill.store import Store
from distill.texts import texts_by_role

# Texts a batch and peak learning rate of the kinds that a recipe's own, a static table's, are not for: of tiny and pretrained
# the best of three rates on dev sets, of layers what its tables ran with (recipes/README.md).
SUITED = {"tiny": (256, 4e-3), "layers": (32, 3e-4), "pretrained": (32, 2e-4)}


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """How the student starts."""

    kind: Literal["static", "layers", "tiny", "pretrained"] = "static"
    """A table of token vectors, some of the teacher's layers, a small transformer on such a table, or another model.
    Batch and rate, unless given: 256 and 4e-3 for tiny, 32 and 3e-4 for layers, 32 and 2e-4 for pretrained."""
    width: int | None = None
    """Of the static table (None: 256, or the teacher's width if that is smaller), or of a tiny student (None: 128)."""
    layers: Literal["auto"] | tuple[int, ...] = ()
    """Numbers of the teacher's layers to keep, from 0; none given: 0, 1 and the last. auto: those that, untrained, come nearest to its vectors."""
    depth: int | None = None
    """Layers of a tiny student (None: 2), or to keep by --student.layers auto (None: 3)."""
    name: str | None = None
    """Folder or Hub name of the pretrained model; of kind layers: of a student whose layers are kept instead of the teacher's."""
    projection: Literal["ridge", "none"] = "none"
    """ridge: the last Dense layer starts at the closed-form solution, ridge regression to the teacher's vectors."""
    train_token_table: bool = False
    """Train the input embeddings of kept layers or of a pretrained transformer, too; a tiny or static student always trains its own."""
    vocabulary: int | None = None
    """How many tokens a static student keeps, those that the texts use most. None: all of the teacher's."""
    characters: Literal["all", "seen"] = "all"
    """Of --student.vocabulary: keep every single character, or those of the texts, which leaves room for words."""
    words: int = 0
    """How many frequent words of the texts, of those that take several tokens now, become tokens of a static student."""
    table: TableFormat = "float32"
    """How a static student's folder holds its table. float16 opens anywhere (SentenceTransformer(FOLDER).float() computes in float32);
    int8, a quarter of the bytes, where distill is installed."""
    intermediate: int | None = None
    """Feed-forward neurons to keep in each layer of kept layers or of a pretrained model, chosen on 256 texts. None: all."""
    heads: int | None = None
    """Attention heads to keep in each layer, likewise; only in classes whose config can name fewer (Qwen, Llama, Gemma)."""
    space: int | None = None
    """Width of a narrower space, the teacher's first principal directions; an index can be converted to it. None: the teacher's space."""

    def __post_init__(self) -> None:
        if (self.kind == "pretrained" and self.name is None) or (self.kind in ("static", "tiny") and self.name):
            raise RecipeError(
                "--student.name names the model of --student.kind pretrained, which needs one, or the one whose layers "
                "--student.kind layers keeps; a static student is made from the teacher alone."
            )
        if self.kind not in ("static", "tiny") and self.width is not None:
            raise RecipeError(
                f"--student.width is of --student.kind static or tiny; a student of kind {self.kind} has its own."
            )
        if self.kind != "layers" and self.layers:
            raise RecipeError(f"--student.layers is of --student.kind layers, got kind {self.kind}.")
        numbers = () if isinstance(self.layers, str) else self.layers
        if list(numbers) != sorted(set(numbers)) or min(numbers, default=0) < 0:
            raise RecipeError(f"--student.layers are rising numbers from 0, got {' '.join(map(str, numbers))}.")
        if self.depth is not None and self.kind != "tiny" and self.layers != "auto":
            raise RecipeError("--student.depth is of --student.kind tiny or --student.layers auto.")
        if self.kind != "static" and (self.vocabulary is not None or self.words or self.table != "float32"):
            raise RecipeError("--student.vocabulary, --student.words and --student.table are of --student.kind static.")
        if self.characters == "seen" and self.vocabulary is None:
            raise RecipeError("--student.characters is of --student.vocabulary, the number of tokens that stay.")
        if self.kind not in ("layers", "pretrained") and (self.intermediate or self.heads) is not None:
            raise RecipeError(
                f"--student.intermediate and --student.heads prune a transformer that is there: --student.kind layers or "
                f"pretrained; got kind {self.kind}, which is made as small as it is asked to be."
            )
        if self.kind == "static" and self.space is not None and (self.width or 0) > self.space:
            raise RecipeError(f"--student.width is at most --student.space {self.space}, got {self.width}.")
        at_least(1, "--student.intermediate", self.intermediate)
        at_least(1, "--student.heads", self.heads)
        at_least(1, "--student.vocabulary", self.vocabulary)
        at_least(0, "--student.words", self.words)
        at_least(1, "--student.space", self.space)
        at_least(1, "--student.depth", self.depth)
        at_least(1, "--student.width", self.width)

    def check(self, teacher: Encoder) -> None:
        """RecipeError for a student that cannot be made of this teacher: before its vectors are computed, not hours later."""
        if self.space is not None:
            require_narrower(teacher, self.space)
        if self.kind == "static":
            students.require_width(teacher, self.width or 1)
        elif self.kind == "tiny":
            students.require_sizes(teacher, self.depth or 2, self.width or min(128, teacher.width))
        else:
            source = self._source(teacher)
            if self.kind == "layers":
                students.layer_numbers(source, (self.depth if self.layers == "auto" else self.layers) or 3)
            if self.intermediate is not None or self.heads is not None:
                students.require_units(source, self.intermediate, self.heads)

    def enter(self, teacher: Encoder, store: Store, texts: list[str] | Mapping[str, list[str]]) -> Space:
        """Where the student is to live: the teacher's own space, or fewer of its directions, with the store turned to them."""
        if self.space is None:
            return Space(teacher, store)
        space = narrow(teacher, store, texts, self.space)
        if distributed.is_main():
            print(f"{space.kept}\nthe turned vectors are in {space.store.path}", flush=True)
        return space

    def build(
        self,
        teacher: Encoder,
        store: Store,
        texts: list[str] | Mapping[str, list[str]],
        *,
        own: Store | None = None,
    ) -> Encoder:
        """The student, untrained, on the teacher's device. The token vectors of a static one are kept in the store.

        `texts` are those of the training, by role as `training.match` takes them: {"query": [...], "document": [...]}.
        `own` is the teacher's own store where `store` holds vectors of several: a student of another width than the
        teacher's then ends in a layer that is fitted to them.
        """
        own = store if own is None else own
        everything = [text for _, some in texts_by_role(texts) for text in some]
        if self.space not in (None, teacher.width):
            raise RecipeError(
                f"--student.space {self.space} is for the recipes that enter it before they build the student "
                f"(StudentConfig.enter); this one builds it in the teacher's {teacher.width} numbers."
            )
        fitted = self.projection == "ridge"
        if self.kind == "static":
            student = self._static(teacher, own, everything)
        elif self.kind == "layers":
            student = self._some_layers(self._source(teacher), teacher, own, texts)
        elif self.kind == "tiny":
            vectors = embed_vocabulary(teacher, own.path)
            width, layers = self.width or min(128, teacher.width), self.depth or 2
            student = students.tiny(teacher, layers=layers, width=width, token_vectors=vectors, texts=everything)
        else:
            source = self._source(teacher)
            student = students.pretrained(source, teacher)
            fitted |= source.full_width != teacher.width
        student.to(teacher.device)
        if student.width != store.width:
            students.lead_to(student, store.width)
            fitted = True
        if self.intermediate is not None or self.heads is not None:
            some, vectors = _spread(texts, teacher, store)
            if fitted:  # to those few first: what goes is judged by the teacher's vectors
                students.fit_projection(student, some, vectors)
            student = students.prune(
                student, intermediate=self.intermediate, heads=self.heads, texts=some, vectors=vectors
            )
        if fitted:
            students.fit_projection(student, texts, lambda some, role: store.vectors(some, prompt=teacher.prompt(role)))
        frozen = self.kind in ("layers", "pretrained") and not self.train_token_table
        if frozen and not isinstance(student.backbone, StaticTable):  # which has nothing else to train
            students.freeze_token_table(student)
        return student

    def _static(self, teacher: Encoder, store: Store, texts: list[str]) -> Encoder:
        options: dict[str, Any] = {"token_vectors": embed_vocabulary(teacher, store.path), "texts": texts}
        if self.vocabulary is not None or self.words:
            size = self.vocabulary or len(teacher.tokenizer) + self.words
            vocabulary = options["vocabulary"] = students.fit_vocabulary(
                teacher, texts, size=size, words=self.words, characters=self.characters
            )
            if words := vocabulary.words:
                stored = embed(words, teacher, store.path)
                options["word_vectors"] = stored.vectors(words, prompt=teacher.prompt(None))
        student = students.static(teacher, width=self.width or min(256, teacher.width), **options)
        students.quantize(student, self.table)
        return student

    def _source(self, teacher: Encoder) -> Encoder:
        """The model that the student is a part of, or starts as: the teacher, a student of an earlier run, or another model."""
        if self.name is None:
            return teacher
        distributed.main_first(partial(fetch, self.name, None))
        source = Encoder.from_pretrained(self.name).to(teacher.device)
        width = self.space or teacher.width
        if self.kind == "layers" and source.width != width:
            raise RecipeError(
                f"--student.kind layers keeps layers of a student of the same teacher: {self.name} has width {source.width}, "
                f"the teacher {width}. Start from it with --student.kind pretrained."
            )
        return source

    def _some_layers(
        self, source: Encoder, teacher: Encoder, store: Store, texts: list[str] | Mapping[str, list[str]]
    ) -> Encoder:
        projection = self.projection == "ridge"
        if self.layers != "auto":
            return students.keep_layers(source, self.layers or 3, projection=projection)
        some, vectors = _spread(texts, teacher, store)
        count = self.depth or 3
        return students.keep_layers(source, "auto", projection=projection, count=count, texts=some, vectors=vectors)


def suited(arguments: Sequence[str]) -> list[str]:
    """Flags of --train that suit the --student.kind among `arguments`, to stand in front of them: one that is given comes last, and counts."""
    words = [word for argument in arguments for word in argument.split("=", 1)]
    kinds = [kind for flag, kind in itertools.pairwise(words) if flag == "--student.kind"]
    if not kinds or kinds[-1] not in SUITED:
        return []
    batch_size, rate = SUITED[kinds[-1]]
    return ["--train.batch-size", str(batch_size), "--train.learning-rate", str(rate)]


def describe_start(student: Encoder, teacher: Encoder, store: Store, texts: list[str] | Mapping[str, list[str]]) -> str:
    """One line on a student before its training: parameters, bytes, texts/s, and its cosine to the teacher on 256 of `texts`."""
    some, vectors = _spread(texts, teacher, store)
    return students.describe(student, some, vectors if student.width == vectors.shape[1] else None)


def _spread(
    texts: list[str] | Mapping[str, list[str]], teacher: Encoder, store: Store
) -> tuple[list[str] | dict[str, list[str]], Tensor]:
    """256 texts at most, spread evenly over those of each role, with the teacher's stored vectors."""
    roles: dict[str, list[str]] = dict(texts) if isinstance(texts, Mapping) else {"": texts}
    some = {role: [part[i] for i in evenly_spaced(len(part), 256 // len(roles))] for role, part in roles.items()}
    vectors = torch.cat([store.vectors(part, prompt=teacher.prompt(role or None)) for role, part in some.items()])
    return some if isinstance(texts, Mapping) else some[""], vectors
