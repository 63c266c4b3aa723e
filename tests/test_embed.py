"""A teacher runs once per text, on any number of processes, killed or not; the bits do not depend on it."""

import json
import math
import threading
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import processes
import pytest
import runs
import torch
from filelock import FileLock
from safetensors.numpy import save_file

from distill import distributed, files
from distill.embed import default_store, embed, embed_vocabulary, import_vectors, job, places, taking
from distill.embed.taking import main
from distill.encoder import Encoder
from distill.errors import DataError, IntegrityError, NumericsError, RecipeError, ResourceError
from distill.evaluation import EvaluationData, evaluate
from distill.modules import Tokens
from distill.store import GOOD, NO_TOKENS, NOT_FINITE, Store, compression, text_keys
from distill.students import fit_projection
from distill.training import match


class Counted:
    """Counts a teacher's texts as they are computed."""

    def __init__(self, teacher: Encoder, monkeypatch: pytest.MonkeyPatch):
        self.texts, compute = 0, teacher.compute

        def counting(tokens: Tokens) -> torch.Tensor:
            self.texts += len(tokens)
            return compute(tokens)

        monkeypatch.setattr(teacher, "compute", counting)


@pytest.fixture
def teacher(tiny_bert: Path) -> Encoder:
    return runs.teacher(tiny_bert)


@pytest.fixture
def counted(teacher: Encoder, monkeypatch: pytest.MonkeyPatch) -> Counted:
    return Counted(teacher, monkeypatch)


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several windows and many batches from few texts."""
    monkeypatch.setattr(job, "WINDOW", 32)
    monkeypatch.setattr(job, "BATCH_TOKENS", 64)


@pytest.mark.parametrize("model", ["tiny_bert", "tiny_mpnet"])
def test_vectors_are_what_the_teacher_gives(model: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    teacher, texts = runs.teacher(request.getfixturevalue(model)), runs.texts(60)
    store = embed(texts, teacher, tmp_path)
    torch.testing.assert_close(store.vectors(texts), teacher.encode(texts), rtol=1e-3, atol=1e-3)
    assert (store.flags == GOOD).all()
    lengths = teacher.tokenize(texts).tokens.lengths.numpy()
    assert (store.token_counts[store.find(text_keys(texts))] == lengths).all()


def test_a_second_call_computes_nothing(teacher: Encoder, counted: Counted, tmp_path: Path) -> None:
    first = embed(runs.texts(30), teacher, tmp_path)
    assert counted.texts == 30
    manifest = (tmp_path / "manifest.json").stat().st_mtime_ns
    second = embed(runs.texts(30)[::-1], teacher, tmp_path)
    assert counted.texts == 30
    assert (tmp_path / "manifest.json").stat().st_mtime_ns == manifest
    assert torch.equal(first.vectors(runs.texts(30)), second.vectors(runs.texts(30)))
    assert len(embed(runs.texts(40), teacher, tmp_path)) == counted.texts == 40
    assert not (tmp_path / "job.safetensors").exists()


def test_duplicates_are_one_row_and_two_prompts_two(
    tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = runs.teacher(tiny_model("bert", layers=2, prompts={"query": "find: "}))
    counted = Counted(teacher, monkeypatch)
    texts = runs.texts(5)
    assert len(embed([*texts, *texts], teacher, tmp_path)) == counted.texts == 5
    store = embed(texts, teacher, tmp_path, role="query")
    assert len(store) == counted.texts == 10
    asked, plain = store.vectors(texts, prompt="find: "), store.vectors(texts)
    torch.testing.assert_close(asked, teacher.encode(texts, role="query"), rtol=1e-3, atol=1e-3)
    assert (asked - plain).abs().max() > 0.05


def test_no_texts_and_one_text(teacher: Encoder, counted: Counted, tmp_path: Path) -> None:
    assert len(embed([], teacher, tmp_path)) == counted.texts == 0
    assert len(embed(["one"], teacher, tmp_path)) == counted.texts == 1


def test_texts_without_tokens_are_flagged(teacher: Encoder, tmp_path: Path) -> None:
    texts = ["", " \t", "a flute"]
    store = embed(texts, teacher, tmp_path)
    assert store.flags[store.find(text_keys(texts))].tolist() == [NO_TOKENS, NO_TOKENS, GOOD]


def test_a_vector_that_is_not_finite_is_set_aside(
    teacher: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute, ids = teacher.compute, teacher.tokenize(["bridge"]).tokens.ids
    word = int(ids[1])

    def broken(tokens: Tokens) -> torch.Tensor:
        vectors = compute(tokens).clone()
        for row in range(len(tokens)):
            if word in tokens.rows(torch.tensor([row])).ids:
                vectors[row] = float("nan")
        return vectors

    monkeypatch.setattr(teacher, "compute", broken)
    texts = [*runs.texts(20), "the old bridge"]
    broken_texts = [text for text in texts if "bridge" in text.lower().split()]
    store = embed(texts, teacher, tmp_path)
    student = runs.student("static", runs.teacher(teacher.name))
    examples = match(texts, student, teacher, store)
    assert (store.flags == NOT_FINITE).sum() == len(broken_texts)
    assert set(examples.texts) == set(texts) - set(broken_texts)
    assert f"{len(broken_texts)} left out: teacher vector not finite" in examples.report


def test_a_bf16_vector_that_is_not_finite_is_computed_once_more(
    teacher: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher.compute_dtype = "bfloat16"
    compute = teacher.compute
    monkeypatch.setattr(teacher, "compute", lambda tokens: compute(tokens) * float("nan"))
    store = embed(runs.texts(9), teacher, tmp_path)
    assert (store.flags == GOOD).all()


@pytest.mark.parametrize(
    ("value", "message"), [(1.0, "the same vector for all"), (float("nan"), "no vector that is finite")]
)
def test_a_teacher_without_information_is_refused(
    teacher: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float, message: str
) -> None:
    monkeypatch.setattr(teacher, "compute", lambda tokens: torch.full((len(tokens), teacher.width), value))
    with pytest.raises(NumericsError, match=message):
        embed(runs.texts(20), teacher, tmp_path)


def test_one_text_is_no_list_of_its_letters(teacher: Encoder, tmp_path: Path) -> None:
    stored = embed(runs.texts(20), teacher, tmp_path)
    student = runs.student("static", teacher)
    for call in (
        lambda: embed("hello", teacher, tmp_path),
        lambda: match("hello", student, teacher, stored),
        lambda: match({"query": "hello"}, student, teacher, stored),
        lambda: fit_projection(student, "hello", torch.zeros(1, teacher.width)),
        lambda: evaluate({"student": student}, teacher, EvaluationData(texts="hello"), store=tmp_path),
    ):
        with pytest.raises(DataError, match=r"got one text, 'hello'\. Put it in a list"):
            call()


@pytest.mark.parametrize(
    "wrong", [math.nan, None, 7, "half \ud83d"], ids=["NaN", "None", "number", "half a surrogate pair"]
)
@pytest.mark.usefixtures("unchecked")
def test_what_is_no_text_is_named_before_the_teacher_runs(
    wrong: Any, teacher: Encoder, counted: Counted, tmp_path: Path
) -> None:
    texts = [*runs.texts(20), wrong]
    for call in (
        partial(embed, texts, teacher, tmp_path / "store"),
        partial(import_vectors, texts, np.zeros((21, teacher.width)), teacher, tmp_path / "store"),
        partial(teacher.encode, texts),
    ):
        with pytest.raises(DataError, match=r"text 20 (is|holds half)"):
            call()
    assert not counted.texts
    assert not (tmp_path / "store").exists()


@pytest.mark.usefixtures("unchecked")
def test_texts_may_come_one_by_one(teacher: Encoder, tmp_path: Path) -> None:
    assert len(embed(iter(runs.texts(9)), teacher, tmp_path / "store")) == 9  # type: ignore[arg-type]


@pytest.mark.parametrize("directions", [1, 2])
def test_a_teacher_whose_vectors_lie_on_one_line_is_refused(
    teacher: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, directions: int
) -> None:
    base = torch.randn(directions, teacher.width)

    def compute(tokens: Tokens) -> torch.Tensor:
        vectors = torch.randn(len(tokens), directions) @ base
        vectors[0] = 0  # says nothing, of either kind
        return vectors

    monkeypatch.setattr(teacher, "compute", compute)
    with pytest.raises(NumericsError, match="one line") if directions < 2 else nullcontext():
        embed(runs.texts(200), teacher, tmp_path)


def test_the_mode_of_the_teacher_does_not_matter(teacher: Encoder, tmp_path: Path) -> None:
    expected = embed(runs.texts(10), teacher, tmp_path / "a").vectors(runs.texts(10))
    teacher.train()
    teacher.backbone.model.embeddings.eval()
    modes = [module.training for module in teacher.modules()]
    assert torch.equal(embed(runs.texts(10), teacher, tmp_path / "b").vectors(runs.texts(10)), expected)
    assert [module.training for module in teacher.modules()] == modes


def test_another_teacher_is_refused(teacher: Encoder, tiny_mpnet: Path, tmp_path: Path) -> None:
    embed(runs.texts(10), teacher, tmp_path)
    with pytest.raises(IntegrityError, match=r"another encoder(.|\n)*weights: "):
        embed(runs.texts(10), runs.teacher(tiny_mpnet), tmp_path)
    assert default_store(teacher) != default_store(runs.teacher(tiny_mpnet))


def test_the_vectors_of_the_vocabulary(teacher: Encoder, counted: Counted, tmp_path: Path) -> None:
    vectors = embed_vocabulary(teacher, tmp_path)
    size = counted.texts
    assert size == len(teacher.tokenizer)
    torch.testing.assert_close(vectors, teacher.encode_vocabulary(), rtol=1e-3, atol=1e-3)
    assert torch.equal(embed_vocabulary(teacher, tmp_path), vectors)


def test_only_the_rows_of_a_lost_shard_are_computed_anew(
    teacher: Encoder, counted: Counted, tmp_path: Path, small_windows: None
) -> None:
    texts = runs.texts(100)
    before = embed(texts, teacher, tmp_path, flush_seconds=0.0)
    lost = before.shards[1]
    expected, counted.texts = before.vectors(texts), 0
    (tmp_path / lost.file).unlink()
    torch.testing.assert_close(embed(texts, teacher, tmp_path).vectors(texts), expected, rtol=1e-3, atol=1e-3)
    assert counted.texts == lost.rows


def test_no_space_is_said_before_the_teacher_runs(
    teacher: Encoder, counted: Counted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=5))
    with pytest.raises(ResourceError, match="5 are free"):
        embed(runs.texts(10), teacher, tmp_path)
    assert counted.texts == 0
    assert FileLock(tmp_path / ".lock").acquire(timeout=0)


def test_an_error_in_the_middle_frees_the_lock_and_loses_nothing_published(
    teacher: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_windows: None
) -> None:
    texts, compute, calls = runs.texts(100), teacher.compute, iter(range(1000))
    expected = embed(texts, teacher, tmp_path / "whole").vectors(texts)

    def sometimes(tokens: Tokens) -> torch.Tensor:
        if next(calls) == 9:
            raise MemoryError("no room")
        return compute(tokens)

    monkeypatch.setattr(teacher, "compute", sometimes)
    with pytest.raises(MemoryError):
        embed(texts, teacher, tmp_path / "cut", flush_seconds=0.0)
    assert 0 < len(Store.open(tmp_path / "cut")) < 100
    (tmp_path / "cut" / "rows-000000000000000000000000.safetensors").write_text("half")
    assert torch.equal(embed(texts, teacher, tmp_path / "cut").vectors(texts), expected)
    assert not [*(tmp_path / "cut").glob("rows-0000000000*")]


def test_shards_are_written_and_texts_tokenized_beside_the_teacher(
    teacher: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_windows: None
) -> None:
    """What was computed is being written while the teacher runs, and a shard that cannot be written ends the job."""
    texts, threads = runs.texts(100), {"append": set[int](), "tokenize": set[int](), "compute": set[int]()}
    expected = embed(texts, teacher, tmp_path / "expected").vectors(texts)
    for owner, name in ((Store, "append"), (Encoder, "tokenize"), (Encoder, "compute")):
        original = getattr(owner, name)

        def noting(*arguments: Any, name: str = name, original: Any = original, **options: Any) -> Any:
            threads[name].add(threading.get_ident())
            return original(*arguments, **options)

        monkeypatch.setattr(owner, name, noting)
    store = embed(texts, teacher, tmp_path / "store", flush_seconds=0.0)
    assert threads["compute"] == {threading.get_ident()}
    assert threading.get_ident() not in threads["append"] | threads["tokenize"]
    assert torch.equal(store.vectors(texts), expected)

    def full(*_: Any) -> Any:
        raise ResourceError("no room")

    monkeypatch.setattr(Store, "append", full)
    with pytest.raises(ResourceError, match="no room"):
        embed(texts, teacher, tmp_path / "full", flush_seconds=0.0)
    assert FileLock(tmp_path / "full" / ".lock").acquire(timeout=0)
    assert len(Store.open(tmp_path / "full")) == 0


def test_whole_windows_are_dealt_out_where_there_are_many(
    teacher: Encoder, counted: Counted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = runs.texts(100)
    expected = embed(texts, teacher, tmp_path / "a")
    monkeypatch.setattr(job, "WINDOW", 4)
    parts, tokenized = [], []
    tokenize = teacher.tokenize

    def noting(texts: list[str]) -> Any:
        tokenized.append(len(texts))
        return tokenize(texts)

    for rank in range(3):  # what each of three processes would compute
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(distributed, "world_size", lambda: 3)
        planned = job.Job(teacher, texts, text_keys(texts), noting, "", 1.0)  # type: ignore[arg-type]
        parts += [batch.numbers for batch in planned._batches(np.arange(100), np.ones(100, dtype=bool))]
    assert tokenized == [4] * 25  # each window by one of them
    assert sorted(np.concatenate(parts).tolist()) == [*range(100)]
    assert len(expected) == 100


# Compressed


@pytest.fixture
def small_sample(monkeypatch: pytest.MonkeyPatch, small_windows: None) -> None:
    """A codec is fitted to 40 texts, so that others come after it."""
    monkeypatch.setattr(compression, "FIT_ROWS", 40)


@pytest.mark.parametrize("store_as", ["int8", "pca-24", "pca-24-int8"])
def test_vectors_are_compressed_as_they_come(
    teacher: Encoder, counted: Counted, tmp_path: Path, store_as: str, small_sample: None
) -> None:
    texts = runs.texts(100)
    expected = teacher.encode(texts)
    counted.texts = 0
    store = embed(texts, teacher, tmp_path, store_as=store_as)
    assert counted.texts == len(store) == 100
    assert str(Store.open(tmp_path).codec.format) == store_as
    agreement = torch.nn.functional.cosine_similarity(store.vectors(texts), expected)
    assert agreement.min() > (0.999 if store_as == "int8" else 0.9)
    assert store.distortion is not None
    assert store.distortion.rows == 100
    assert abs(1 - agreement.mean().item() - store.distortion.mean) < 1e-4
    assert not (tmp_path / ".sample").exists()
    more = embed([*texts, *runs.texts(130)[100:]], teacher, tmp_path)
    assert counted.texts == len(more) == 130
    assert torch.equal(more.vectors(texts), store.vectors(texts))


def test_a_store_keeps_its_format(teacher: Encoder, tmp_path: Path) -> None:
    embed(runs.texts(40), teacher, tmp_path / "plain")
    embed(runs.texts(40), teacher, tmp_path / "small", store_as="int8")
    with pytest.raises(RecipeError, match=r"as float16, and int8 was asked for(.|\n)*distill.store compress"):
        embed(runs.texts(40), teacher, tmp_path / "plain", store_as="int8")
    with pytest.raises(RecipeError, match="as int8, and float16 was asked for"):
        embed(runs.texts(40), teacher, tmp_path / "small", store_as="float16")
    with pytest.raises(RecipeError, match="keeps 32 of 32 columns"):
        embed(runs.texts(40), teacher, tmp_path / "other", store_as="pca-32")
    with pytest.raises(RecipeError, match="not as 'zip'"):
        embed(runs.texts(40), teacher, tmp_path / "other", store_as="zip")
    assert not (tmp_path / "other").exists()
    assert len(embed(runs.texts(50), teacher, tmp_path / "plain", store_as="float16")) == 50
    assert default_store(teacher, "int8") == default_store(teacher).with_name(default_store(teacher).name + "-int8")


def test_too_few_texts_for_so_many_components_are_refused_and_kept(
    teacher: Encoder, counted: Counted, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="pca-24 is fitted to 24 rows or more, got 20"):
        embed(runs.texts(20), teacher, tmp_path, store_as="pca-24")
    embed(runs.texts(30), teacher, tmp_path, store_as="pca-24")
    assert counted.texts == 30


def test_a_compressed_store_holds_the_vocabulary_and_vectors_that_exist(teacher: Encoder, tmp_path: Path) -> None:
    texts = runs.texts(60)
    embed(texts[:30], teacher, tmp_path, store_as="int8")
    vectors = embed_vocabulary(teacher, tmp_path)
    assert torch.nn.functional.cosine_similarity(vectors, teacher.encode_vocabulary()).min() > 0.99
    store = import_vectors(texts, teacher.encode(texts).numpy(), teacher, tmp_path)
    assert len(store) == 60 + len(teacher.tokenizer)
    assert "teacher vectors as int8: 1 - cosine" in match(texts, runs.student("static", teacher), teacher, store).report


@pytest.mark.parametrize("at", ["sample", "fit", "taking in", "others"])
def test_a_compressed_build_that_stops_anywhere_goes_on_to_the_same_bits(
    teacher: Encoder, counted: Counted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_sample: None, at: str
) -> None:
    texts = runs.texts(100)
    expected = embed(texts, teacher, tmp_path / "whole", flush_seconds=0.0, store_as="pca-24-int8").vectors(texts)
    counted.texts = 0

    def stop(*_: Any, **__: Any) -> None:
        raise MemoryError("no room")

    with monkeypatch.context() as patch:
        if at in ("fit", "taking in"):
            patch.setattr(places, {"fit": "_create_fitted", "taking in": "_take_in_sample"}[at], stop)
        else:
            compute, last = teacher.compute, 20 if at == "sample" else 70
            patch.setattr(teacher, "compute", lambda tokens: stop() if counted.texts > last else compute(tokens))
        with pytest.raises(MemoryError):
            embed(texts, teacher, tmp_path / "cut", flush_seconds=0.0, store_as="pca-24-int8")
    assert 0 < counted.texts < 100
    assert torch.equal(embed(texts, teacher, tmp_path / "cut", store_as="pca-24-int8").vectors(texts), expected)
    assert not (tmp_path / "cut" / ".sample").exists()


def test_a_sample_that_a_kill_left_behind_is_taken_in_once(
    teacher: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = runs.texts(40)

    def stop(path: Path) -> None:
        raise MemoryError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(files, "remove_folder", stop)
        with pytest.raises(MemoryError, match="killed"):
            embed(texts, teacher, tmp_path, store_as="int8")
    assert (tmp_path / ".sample").exists()
    assert len(embed(texts, teacher, tmp_path, store_as="int8")) == 40
    assert not (tmp_path / ".sample").exists()


# What is left where nothing is missing


def leftovers(path: Path, keys: np.ndarray) -> list[Path]:
    """The list of a job, and what a writer that is killed leaves."""
    left = [path / "job.safetensors", path / ".manifest.json.abcd1234", path / ".tmpAbC123"]
    save_file({"keys": keys}, left[0])
    for item in left[1:]:
        item.write_bytes(b"")
    return left


def test_a_store_that_lacks_nothing_is_tidied_unless_somebody_is_writing(teacher: Encoder, tmp_path: Path) -> None:
    texts = runs.texts(20)
    store = embed(texts, teacher, tmp_path)
    left = leftovers(tmp_path, text_keys(texts))
    with store.lock():
        embed(texts, teacher, tmp_path)
        assert all(item.exists() for item in left)
    embed(texts, teacher, tmp_path)
    assert not any(item.exists() for item in left)


def test_the_list_of_a_job_that_is_not_done_stays(teacher: Encoder, tmp_path: Path) -> None:
    texts = runs.texts(20)
    embed(texts[:10], teacher, tmp_path)
    job_list = leftovers(tmp_path, text_keys(texts))[0]
    embed(texts[:10], teacher, tmp_path)
    assert job_list.exists()
    embed(texts, teacher, tmp_path)
    assert not job_list.exists()


def test_fewer_texts_than_those_of_an_unfinished_job_are_a_job_of_their_own(teacher: Encoder, tmp_path: Path) -> None:
    texts = runs.texts(20)
    embed(texts[:10], teacher, tmp_path)
    leftovers(tmp_path, text_keys(texts))
    store = embed(texts[5:15], teacher, tmp_path)
    assert len(store) == 15
    torch.testing.assert_close(store.vectors(texts[:15]), teacher.encode(texts[:15]), rtol=1e-3, atol=1e-3)


# Vectors that exist already


def test_vectors_of_this_teacher_are_taken_over(teacher: Encoder, counted: Counted, tmp_path: Path) -> None:
    texts = runs.texts(50)
    vectors = teacher.encode(texts).numpy()
    vectors[7] = np.nan
    counted.texts = 0
    store = import_vectors([*texts, texts[3]], np.concatenate([vectors, vectors[3:4]]), teacher, tmp_path)
    assert len(store) == 50
    assert counted.texts <= 32
    assert (store.flags == NOT_FINITE).sum() == 1
    np.testing.assert_allclose(store.vectors(texts[:7]), vectors[:7], rtol=1e-3, atol=1e-3)
    counted.texts = 0
    embed(texts, teacher, tmp_path)
    assert counted.texts == 0
    assert len(import_vectors(texts, vectors, teacher, tmp_path)) == 50


def test_a_vector_of_a_text_without_tokens_is_set_aside_as_such(teacher: Encoder, tmp_path: Path) -> None:
    texts = [*runs.texts(9), ""]
    vectors = np.concatenate([teacher.encode(texts[:9]).numpy(), np.ones((1, teacher.width), np.float32)])
    store = import_vectors(texts, vectors, teacher, tmp_path, checked=1)
    assert store.flags[store.find(text_keys(texts))].tolist() == [GOOD] * 9 + [NO_TOKENS]


def test_other_vectors_are_refused(teacher: Encoder, tmp_path: Path) -> None:
    texts = runs.texts(50)
    vectors = teacher.encode(texts).numpy()
    with pytest.raises(IntegrityError, match=r"row \d+ .* has cosine"):
        import_vectors(texts, vectors[::-1].copy(), teacher, tmp_path)
    with pytest.raises(IntegrityError, match=r"max_length 64, prompt ''"):
        import_vectors(texts, np.random.default_rng(0).normal(size=vectors.shape), teacher, tmp_path)
    for wrong in (vectors[:-1], vectors[:, :-1], vectors[0]):
        with pytest.raises(DataError, match=r"expected \(50, 32\)"):
            import_vectors(texts, wrong, teacher, tmp_path)
    with pytest.raises(DataError, match="0 texts"):
        import_vectors([], vectors[:0], teacher, tmp_path)
    with pytest.raises(DataError, match="finite and not zero"):
        import_vectors(texts, np.full_like(vectors, np.nan), teacher, tmp_path)
    assert not (tmp_path / "manifest.json").exists()


def test_vectors_that_moved_by_a_row_are_refused_although_evenly_spaced_ones_are_right(
    teacher: Encoder, tmp_path: Path
) -> None:
    texts = runs.texts(100)
    vectors = teacher.encode(texts).numpy()
    moved = np.roll(vectors, 1, axis=0)
    for count in (16, 32):
        spaced = np.linspace(0, 99, count).astype(int)
        moved[spaced] = vectors[spaced]
    with pytest.raises(IntegrityError, match=r"row \d+ .* has cosine"):
        import_vectors(texts, moved, teacher, tmp_path)
    with pytest.raises(RecipeError, match="1 text or more"):
        import_vectors(texts, vectors, teacher, tmp_path, checked=0)


def test_an_import_keeps_what_another_process_stored_meanwhile(
    teacher: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = runs.texts(40)
    vectors = teacher.encode(texts).numpy()
    refuse = taking._refuse_foreign

    def meanwhile(*arguments: Any) -> None:
        refuse(*arguments)
        embed(texts[:20], teacher, tmp_path)

    monkeypatch.setattr(taking, "_refuse_foreign", meanwhile)
    assert len(import_vectors(texts[10:], vectors[10:], teacher, tmp_path)) == 40
    assert len(Store.open(tmp_path)) == 40


def test_the_command_that_imports(
    tiny_bert: Path, teacher: Encoder, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    texts = runs.texts(20)
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    np.save(tmp_path / "vectors.npy", teacher.encode(texts).numpy())
    (tmp_path / "broken.npy").write_bytes(b"no array")
    (tmp_path / "v.csv").write_text("0.5,0.25\n")
    np.savez(tmp_path / "v.npz", vectors=np.ones(3))
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    command = [
        str(tmp_path / "store"),
        "--teacher",
        str(tiny_bert),
        "--texts",
        str(tmp_path / "texts.jsonl"),
        "--vectors",
    ]
    assert main([*command, str(tmp_path / "vectors.npy"), "--checked", "4"]) == 0
    assert "20 vectors of width 32\n" in capsys.readouterr().out
    for name in ("broken.npy", "objects.npy", "nothing.npy", "v.csv", "v.npz"):
        assert main([*command, str(tmp_path / name)]) == 3
        told = capsys.readouterr().err
        assert name in told
        assert ("is no .npy file, which is expected" in told) == (name[0] in "bv")


def test_the_command_that_imports_counts_what_is_set_aside(
    tiny_bert: Path, teacher: Encoder, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    texts, path = runs.texts(20), str(tmp_path / "vectors.npy")
    vectors = teacher.encode(texts).numpy()
    vectors[[3, 4]], vectors[5] = np.nan, 0
    np.save(path, vectors)
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    command = [str(tmp_path / "store"), "--teacher", str(tiny_bert), "--texts", str(tmp_path / "texts.jsonl")]
    assert main([*command, "--vectors", path]) == 0
    assert "20 vectors of width 32; set aside: 2 not finite, 1 zero vector" in capsys.readouterr().out


# Real processes


def build(
    model: str, path: str, count: int, flush_seconds: float = 30.0, wait: float = 0.0, store_as: str | None = None
) -> dict[str, Any]:
    """In a process of its own: embed, slowly if `wait` says so; how many texts it computed and what is stored."""
    job.WINDOW, job.BATCH_TOKENS, compression.FIT_ROWS = 32, 64, 80
    teacher, computed = runs.teacher(model), 0
    compute = teacher.compute

    def slowly(tokens: Tokens) -> torch.Tensor:
        nonlocal computed
        computed += len(tokens)
        time.sleep(wait)
        return compute(tokens)

    teacher.compute = slowly  # type: ignore[method-assign]
    texts = runs.texts(count)
    store = embed(texts, teacher, Path(path), flush_seconds=flush_seconds, store_as=store_as)
    return {"computed": computed, "rows": len(store), "bits": store.vectors(texts).sum().item()}


COUNT = 200


@pytest.fixture(scope="module")
def serial(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    """The vectors of an uninterrupted build by one process."""
    return uninterrupted(tiny_bert, tmp_path_factory.mktemp("serial"))


@pytest.fixture(scope="module")
def serial_int8(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    return uninterrupted(tiny_bert, tmp_path_factory.mktemp("serial"), "int8")


def uninterrupted(model: Path, path: Path, store_as: str | None = None) -> torch.Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "WINDOW", 32)
        patch.setattr(job, "BATCH_TOKENS", 64)
        patch.setattr(compression, "FIT_ROWS", 80)
        return embed(runs.texts(COUNT), runs.teacher(model), path, store_as=store_as).vectors(runs.texts(COUNT))


def test_two_processes_build_the_serial_store(serial: torch.Tensor, tiny_bert: Path, tmp_path: Path) -> None:
    found = processes.run(build, 2, tmp_path, model=tiny_bert, path=tmp_path / "store", count=COUNT, flush_seconds=0.1)
    assert sum(one["computed"] for one in found) == COUNT
    assert min(one["computed"] for one in found) > COUNT / 4
    assert [one["rows"] for one in found] == [COUNT, COUNT]
    assert torch.equal(Store.open(tmp_path / "store").vectors(runs.texts(COUNT)), serial)


@pytest.mark.parametrize("resumed_by", [1, 2])
def test_a_killed_build_goes_on_to_the_same_bits(
    serial: torch.Tensor, tiny_bert: Path, tmp_path: Path, resumed_by: int
) -> None:
    path = tmp_path / "store"
    slow = {"model": tiny_bert, "path": path, "count": COUNT, "flush_seconds": 0.05, "wait": 0.05}
    group = processes.start(build, 3 - resumed_by, tmp_path, **slow)
    group.wait_until(lambda: len([*path.glob("rows-*.safetensors")]) >= 4)
    group.kill()
    stored = len(Store.open(path))
    assert 0 < stored < COUNT
    assert (path / "job.safetensors").exists()
    found = processes.run(build, resumed_by, tmp_path, model=tiny_bert, path=path, count=COUNT)
    assert sum(one["computed"] for one in found) == COUNT - stored
    assert torch.equal(Store.open(path).vectors(runs.texts(COUNT)), serial)
    assert sorted(item.name for item in path.iterdir() if "rows" not in item.name) == [".lock", "manifest.json"]


def test_two_independent_processes_share_one_store(serial: torch.Tensor, tiny_bert: Path, tmp_path: Path) -> None:
    path = tmp_path / "store"
    slow = {"model": tiny_bert, "path": path, "count": COUNT, "flush_seconds": 0.05, "wait": 0.05}
    groups = [processes.start(build, 1, tmp_path / name, **slow) for name in ("a", "b")]
    assert [group.wait() for group in groups] == [[0], [0]]
    assert sorted(group.results()[0]["computed"] for group in groups) == [0, COUNT]
    assert torch.equal(Store.open(path).vectors(runs.texts(COUNT)), serial)


@pytest.mark.parametrize("pattern", [".sample/rows-*.safetensors", "rows-*.safetensors"], ids=["sample", "others"])
def test_a_killed_compressed_build_goes_on_to_the_same_bits(
    serial_int8: torch.Tensor, tiny_bert: Path, tmp_path: Path, pattern: str
) -> None:
    path = tmp_path / "store"
    options = {"model": tiny_bert, "path": path, "count": COUNT, "store_as": "int8", "flush_seconds": 0.05}
    group = processes.start(build, 2, tmp_path, wait=0.05, **options)
    group.wait_until(lambda: len([*path.glob(pattern)]) >= 3)
    group.kill()
    [found] = processes.run(build, 1, tmp_path, **options)
    assert 0 < found["computed"] < COUNT
    assert found["rows"] == COUNT
    assert torch.equal(Store.open(path).vectors(runs.texts(COUNT)), serial_int8)
    left = sorted(item.name.split("-")[0] for item in path.iterdir() if not item.name.startswith("rows-"))
    assert left == [".lock", "codec", "manifest.json"]


def test_a_store_may_be_made_by_many_at_once(tmp_path: Path) -> None:
    made: list[int] = []

    def make() -> None:
        store = Store.open_or_create(tmp_path / "store", {"a": 1}, 4)
        with store.lock():
            made.append(len(store))

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [0] * 8


@pytest.mark.slow
def test_a_build_killed_at_any_instant_goes_on_to_the_same_bits(
    serial: torch.Tensor, tiny_bert: Path, tmp_path: Path
) -> None:
    for instant in range(40):
        path = tmp_path / f"store-{instant}"
        slow = {"model": tiny_bert, "path": path, "count": COUNT, "flush_seconds": 0.05, "wait": 0.01}
        group = processes.start(build, 1 + instant % 2, tmp_path, **slow)
        group.wait_until(lambda path=path: (path / "manifest.json").exists())
        time.sleep(instant / 40)
        group.kill()
        processes.run(build, 1, tmp_path, model=tiny_bert, path=path, count=COUNT)
        assert torch.equal(Store.open(path).vectors(runs.texts(COUNT)), serial)
