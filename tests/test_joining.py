"""Several teachers become one target, exactly as the algebra says, and a student trains on it."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
import torch
from torch import Tensor

from distill import alignment, joining, teachers
from distill.alignment import generalised_procrustes, nearest_rotation, principal_directions
from distill.embed import embed, embed_vocabulary
from distill.encoder import Encoder
from distill.errors import DataError, IntegrityError, RecipeError
from distill.joining import concatenate, join_stores, keys_by_role, methods, procrustes_mean
from distill.joining import stores as joined_stores
from distill.losses import CosineDistance
from distill.store import GOOD, NO_TOKENS, NOT_FINITE, Rows, Store, compress, text_keys
from distill.training import TrainConfig, match, train

METHODS: dict[str, Callable[..., joining.Joined]] = {
    "concatenate": concatenate,
    "gram": lambda stores, path, **options: concatenate(stores, path, width=6, **options),
    "procrustes": procrustes_mean,
}
COUNT = 60


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> Callable[..., joining.Joined]:
    return METHODS[request.param]


def names(count: int = COUNT) -> list[str]:
    return [f"text {i}" for i in range(count)]


def unit(rows: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows.double(), dim=1)


def random(width: int, count: int = COUNT, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) * torch.linspace(1, 0.2, width)


def rotation(width: int, seed: int = 5) -> Tensor:
    return torch.linalg.qr(random(width, width, seed).double()).Q


def write(
    path: Path, vectors: Tensor, texts: list[str] | None = None, flags: np.ndarray | None = None, prompt: str = ""
) -> Store:
    texts = names(len(vectors)) if texts is None else texts
    made = Store.open_or_create(path, {"weights": path.name}, vectors.shape[1])
    flags = np.full(len(texts), GOOD) if flags is None else flags
    made.publish(
        made.append(
            Rows(vectors.numpy(), text_keys(texts, prompt=prompt), np.arange(len(texts)) + len(path.name), flags)
        )
    )
    return made


def stored(store: Store, texts: list[str] | None = None) -> Tensor:
    """Rows as they lie in the store, at length 1, in float64."""
    return unit(store.vectors(names() if texts is None else texts))


@pytest.fixture
def two(tmp_path: Path) -> list[Store]:
    """Widths 8 and 5, related and not the same."""
    first = random(8)
    return [write(tmp_path / "a", first), write(tmp_path / "b", first @ random(5, 8, seed=2) + random(5, seed=3) / 3)]


# The algebra


def test_cosines_of_the_concatenation_are_the_weighted_mean_of_cosines(two: list[Store], tmp_path: Path) -> None:
    joined = concatenate(two, tmp_path / "new", weights=(3.0, 1.0))
    rows, (a, b) = stored(joined.store), [stored(store) for store in two]
    assert joined.store.width == 13
    mean = (3 * a @ a.T + b @ b.T) / 4
    torch.testing.assert_close(rows @ rows.T, mean, rtol=0, atol=2e-3)
    torch.testing.assert_close(joined.store.vectors(names()).norm(dim=1), torch.ones(COUNT), rtol=0, atol=1e-3)
    assert joined.error < 1e-3
    assert (rows @ rows.T - (a @ a.T + 3 * b @ b.T) / 4).abs().max() > 0.05
    off = ~torch.eye(COUNT, dtype=torch.bool)
    each = [float((rows @ rows.T - gram).abs()[off].mean()) for gram in (a @ a.T, b @ b.T)]
    assert joined.errors == pytest.approx(each, abs=1e-3)
    assert joined.to_first is None


def test_the_gram_average_is_the_truncated_eigendecomposition(two: list[Store], tmp_path: Path) -> None:
    joined = concatenate(two, tmp_path / "new", width=6, weights=(3.0, 1.0))
    rows, (a, b) = stored(joined.store), [stored(store) for store in two]
    values, vectors = torch.linalg.eigh((3 * a @ a.T + b @ b.T) / 4)
    best = unit(vectors[:, -6:] * values[-6:].sqrt())
    assert joined.store.width == 6
    torch.testing.assert_close(rows @ rows.T, best @ best.T, rtol=0, atol=3e-3)


def test_before_it_is_stretched_no_other_subspace_is_nearer(two: list[Store]) -> None:
    sources = joined_stores.read_together(two, (3.0, 1.0), None)
    units = torch.cat(sources.units(sources.good()), dim=1)
    whole = (units @ methods.side_by_side_matrix(sources)).double()
    gram = whole @ whole.T
    best = whole @ principal_directions(whole.T @ whole, 6)
    error = (best @ best.T - gram).square().sum()
    values = torch.linalg.eigvalsh(gram)
    torch.testing.assert_close(error, values[:-6].square().sum(), rtol=1e-6, atol=1e-9)
    for seed in range(20):
        other = whole @ torch.linalg.qr(random(6, 13, seed).double()).Q
        assert (other @ other.T - gram).square().sum() > error
    columns = (units @ methods.principal_matrix(sources, 6)).double()
    torch.testing.assert_close(columns.T @ columns, values[-6:].flip(0).diag(), rtol=1e-4, atol=1e-4)


def test_stretched_rows_are_nearer_to_the_mean_cosines_than_others(two: list[Store], tmp_path: Path) -> None:
    errors = {width: concatenate(two, tmp_path / str(width), width=width).error for width in (2, 4, 6, 9, 13)}
    assert [*errors.values()] == sorted(errors.values(), reverse=True)
    assert errors[13] < 1e-3
    a, b = (stored(store) for store in two)
    mean, off = (a @ a.T + b @ b.T) / 2, ~torch.eye(COUNT, dtype=torch.bool)
    whole = torch.cat([a, b], dim=1) / 2**0.5
    for seed in range(20):
        other = unit(whole @ torch.linalg.qr(random(6, 13, seed).double()).Q)
        assert (other @ other.T - mean).abs()[off].mean() > errors[6]


def test_the_method_gram_is_concatenate_to_a_width(two: list[Store], tmp_path: Path) -> None:
    one = join_stores(two, "gram", None, 6, None, tmp_path / "a1")
    other = concatenate(two, tmp_path / "b1", width=6)
    assert torch.equal(one.store.vectors(names()), other.store.vectors(names()))
    assert one.store.fingerprint == other.store.fingerprint


@pytest.mark.parametrize("width", [None, 6, 8, 13])
def test_the_matrix_is_what_the_rows_were_written_with(two: list[Store], tmp_path: Path, width: int | None) -> None:
    """Also at the width of all, where rows side by side and rows that were turned look alike; and when they are read."""
    units = torch.cat([stored(store) for store in two], dim=1)
    for joined in [concatenate(two, tmp_path / "new", width=width, weights=(3.0, 1.0)) for _ in range(2)]:
        torch.testing.assert_close(unit(units @ joined.matrix.double()), stored(joined.store), rtol=0, atol=2e-3)


def test_at_the_first_teachers_width_rows_are_turned_onto_its_own(two: list[Store], tmp_path: Path) -> None:
    joined = concatenate(two, tmp_path / "new", width=8)
    rows, (a, b) = stored(joined.store), [stored(store) for store in two]
    values, vectors = torch.linalg.eigh((a @ a.T + b @ b.T) / 2)
    best = unit(vectors[:, -8:] * values[-8:].sqrt())
    torch.testing.assert_close(rows @ rows.T, best @ best.T, rtol=0, atol=3e-3)
    assert joined.to_first == pytest.approx(float((rows * a).sum(1).mean()), abs=1e-3)
    assert joined.to_first is not None
    assert joined.to_first > 0.9
    assert (best * a).sum(1).mean() < joined.to_first - 0.1


@pytest.mark.parametrize("weights", [(1.0, 1.0), (5.0, 1.0), (0.0, 1.0)])
def test_procrustes_finds_a_known_rotation(tmp_path: Path, weights: tuple[float, float]) -> None:
    first = random(8)
    stores = [write(tmp_path / "a", first), write(tmp_path / "b", (first.double() @ rotation(8)).float())]
    joined = procrustes_mean(stores, tmp_path / "new", weights=weights)
    torch.testing.assert_close(stored(joined.store), stored(stores[0]), rtol=0, atol=2e-3)
    assert joined.to_first == pytest.approx(1.0, abs=1e-5)
    assert (stored(stores[1]) - stored(stores[0])).abs().max() > 0.1


def test_procrustes_turns_a_narrower_teacher_into_the_first_ones_space(tmp_path: Path) -> None:
    inside = random(5)
    first = (inside.double() @ rotation(8)[:5]).float()
    stores = [write(tmp_path / "a", first), write(tmp_path / "b", inside)]
    joined = procrustes_mean(stores, tmp_path / "new")
    torch.testing.assert_close(stored(joined.store), stored(stores[0]), rtol=0, atol=2e-3)
    joined = procrustes_mean(stores[::-1], tmp_path / "other")
    assert joined.store.width == 5
    torch.testing.assert_close(stored(joined.store), stored(stores[1]), rtol=0, atol=2e-3)


def test_the_rotation_is_the_dense_procrustes_solution(two: list[Store]) -> None:
    a, b = (stored(store) for store in two)
    rows = torch.cat([a, b], dim=1)
    first, second = generalised_procrustes(rows.T @ rows, [8, 5], [0.5, 0.5])
    assert torch.equal(first, torch.eye(8, dtype=torch.float64))
    left, _, right = torch.linalg.svd(b.T @ a, full_matrices=False)
    torch.testing.assert_close(second, left @ right)
    torch.testing.assert_close(second @ second.T, torch.eye(5, dtype=torch.float64))
    distance = (b @ second - a).square().sum()
    for seed in range(20):
        assert (b @ rotation(8, seed)[:5] - a).square().sum() > distance


def test_three_teachers_are_turned_until_no_turn_brings_them_nearer() -> None:
    rows = [unit(random(6)), unit(random(6, seed=1)), unit(random(4, seed=2) + random(4))]
    together = torch.cat(rows, dim=1)
    weights = [0.5, 0.3, 0.2]
    maps = generalised_procrustes(together.T @ together, [6, 6, 4], weights, tolerance=1e-13)

    def apart(turned: list[Tensor]) -> Tensor:
        pairs = [(s, t) for s in range(3) for t in range(s)]
        return torch.stack([weights[s] * weights[t] * (turned[s] - turned[t]).square().sum() for s, t in pairs]).sum()

    found = apart([x @ turn for x, turn in zip(rows, maps, strict=True)])
    start = apart([rows[0], *(x @ nearest_rotation(x.T @ rows[0]) for x in rows[1:])])
    assert found < start
    for seed in range(20):
        for scale in (1e-3, 1e-1):
            generator = scale * (random(6, 6, seed) - random(6, 6, seed).T).double()
            turn = torch.linalg.matrix_exp(generator)
            for s in (1, 2):
                moved = [x @ (m @ turn if i == s else m) for i, (x, m) in enumerate(zip(rows, maps, strict=True))]
                assert apart(moved) >= found * (1 - 1e-9)


def test_the_mean_of_turned_rows_is_what_is_written(two: list[Store], tmp_path: Path) -> None:
    joined = procrustes_mean(two, tmp_path / "new", weights=(3.0, 1.0))
    a, b = (stored(store) for store in two)
    expected = unit(3 * a + b @ nearest_rotation(b.T @ a))
    torch.testing.assert_close(stored(joined.store), expected, rtol=0, atol=2e-3)
    assert (stored(joined.store) - unit(a + b @ nearest_rotation(b.T @ a))).abs().max() > 0.05


def test_a_weight_of_zero_is_as_if_the_teacher_were_not_there(two: list[Store], tmp_path: Path) -> None:
    for name, join in METHODS.items():
        joined = join(two, tmp_path / name, weights=(1.0, 0.0)).store
        rows, first = stored(joined), stored(two[0])
        if name == "gram":
            values, vectors = torch.linalg.eigh(first @ first.T)
            first = unit(vectors[:, -6:] * values[-6:].sqrt())
        torch.testing.assert_close(rows @ rows.T, first @ first.T, rtol=0, atol=3e-3)
        assert joined.width == {"concatenate": 8, "gram": 6, "procrustes": 8}[name]
    other = procrustes_mean(two, tmp_path / "second", weights=(0.0, 1.0)).store
    a, b = (stored(store) for store in two)
    torch.testing.assert_close(stored(other), unit(b @ nearest_rotation(b.T @ a)), rtol=0, atol=2e-3)


def test_lengths_of_a_teachers_rows_do_not_count(tmp_path: Path, method: Callable[..., joining.Joined]) -> None:
    first, second = random(8), random(5, seed=1)
    lengths = torch.linspace(0.5, 4, COUNT)[:, None]
    plain = [write(tmp_path / "a", unit(first).float()), write(tmp_path / "b", unit(second).float())]
    long = [write(tmp_path / "c", lengths * unit(first).float()), write(tmp_path / "d", unit(second).float())]
    found = [stored(method(stores, tmp_path / name).store) for name, stores in (("x", plain), ("y", long))]
    torch.testing.assert_close(*(rows @ rows.T for rows in found), rtol=0, atol=3e-3)


def test_many_blocks_and_shards_are_one_store(
    two: list[Store], tmp_path: Path, method: Callable[..., joining.Joined], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = method(two, tmp_path / "whole").store
    monkeypatch.setattr(joined_stores, "BLOCK", 7)
    monkeypatch.setattr(joined_stores, "SHARD_ROWS", 25)
    parts = method(two, tmp_path / "parts").store
    assert [shard.rows for shard in parts.shards] == [25, 25, 10]
    torch.testing.assert_close(stored(parts), stored(whole), rtol=0, atol=2e-3)


# Rows that are not the same everywhere


def test_texts_that_a_store_lacks_are_left_out_and_counted(
    tmp_path: Path, method: Callable[..., joining.Joined]
) -> None:
    stores = [write(tmp_path / "a", random(8), names()), write(tmp_path / "b", random(8, 45), names(50)[:45])]
    stores.append(write(tmp_path / "c", random(8, 40), names(50)[10:]))
    joined = method(stores, tmp_path / "new")
    assert (len(joined.store), joined.left_out) == (35, 25)
    assert (joined.store.find(text_keys(names()[10:45])) >= 0).all()
    assert (joined.store.find(text_keys([*names()[:10], *names()[45:]])) < 0).all()
    assert "35 vectors" in str(joined)
    assert "25 texts left out" in str(joined)


def test_token_counts_are_those_of_the_first_teacher(tmp_path: Path) -> None:
    stores = [write(tmp_path / "longer", random(8)), write(tmp_path / "b", random(8))]
    joined = procrustes_mean(stores, tmp_path / "new").store
    found = joined.token_counts[joined.find(stores[0].keys)].tolist()
    assert found == stores[0].token_counts.tolist() != stores[1].token_counts.tolist()


def test_rows_that_are_not_good_somewhere_are_flagged_and_fitted_to_nowhere(
    tmp_path: Path, method: Callable[..., joining.Joined]
) -> None:
    first, second = random(8), random(8, seed=1)
    plain = [write(tmp_path / "a", first[5:], names()[5:]), write(tmp_path / "b", second[5:], names()[5:])]
    flags = [np.full(COUNT, GOOD), np.full(COUNT, GOOD)]
    flags[0][[0, 1, 2]], flags[1][[2, 3, 4]] = [NOT_FINITE, NO_TOKENS, NO_TOKENS], [NOT_FINITE, NOT_FINITE, NO_TOKENS]
    first[0], second[2], second[3] = float("nan"), float("nan"), float("inf")
    stores = [write(tmp_path / "c", first, flags=flags[0]), write(tmp_path / "d", second, flags=flags[1])]
    joined = method(stores, tmp_path / "new")
    found = joined.store.flags[joined.store.find(text_keys(names()))]
    assert found.tolist() == [NOT_FINITE, NO_TOKENS, NO_TOKENS, NOT_FINITE, NO_TOKENS] + [GOOD] * 55
    assert joined.set_aside == 5
    assert not joined.store.vectors(names()[:5]).any()
    expected = method(plain, tmp_path / "expected").store
    torch.testing.assert_close(stored(joined.store, names()[5:]), stored(expected, names()[5:]), rtol=0, atol=2e-3)


def test_nothing_in_common_and_nothing_good_are_refused(tmp_path: Path, method: Callable[..., joining.Joined]) -> None:
    stores = [write(tmp_path / "a", random(8)), write(tmp_path / "b", random(8), prompt="query: ")]
    with pytest.raises(DataError, match=r"no text is in all of .*different prompts give keys="):
        method(stores, tmp_path / "new")
    stores[1] = write(tmp_path / "c", random(8), flags=np.full(COUNT, NO_TOKENS))
    with pytest.raises(DataError, match="none of 60 texts has a good vector in every store"):
        method(stores, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_tokens_of_two_tokenizers_are_not_joined_by_number(tiny_bert: Path, tiny_mpnet: Path, tmp_path: Path) -> None:
    both = [runs.teacher(tiny_bert), runs.teacher(tiny_mpnet)]
    stores = []
    for teacher, name in zip(both, "ab", strict=True):
        embed(runs.texts(20), teacher, tmp_path / name)
        embed_vocabulary(teacher, tmp_path / name)
        stores.append(Store.open(tmp_path / name))
    joined = procrustes_mean(stores, tmp_path / "new")
    assert (len(joined.store), joined.left_out) == (20, 0)
    assert (joined.store.find(text_keys(["5"], kind="token")) < 0).all()


def test_other_prompts_are_joined_by_text_and_role(tiny_model: Any, tmp_path: Path) -> None:
    both = [
        runs.teacher(tiny_model("bert", layers=2, prompts={"query": "find: "})),
        runs.teacher(tiny_model("mpnet", layers=2, prompts={"query": "q: ", "document": "d: "})),
    ]
    texts = {"query": runs.texts(30)[:20], "document": runs.texts(30)[5:]}
    for teacher, name in zip(both, "ab", strict=True):
        for role, some in texts.items():
            embed(some, teacher, tmp_path / name, role=role)
    stores = [Store.open(tmp_path / name) for name in "ab"]
    with pytest.raises(DataError, match="no text is in all"):
        procrustes_mean(stores, tmp_path / "new")
    joined = concatenate(stores, tmp_path / "new", keys=[keys_by_role(texts, teacher) for teacher in both]).store
    assert len(joined) == 45
    for role, some in texts.items():
        rows = [unit(store.vectors(some, prompt=one.prompt(role))) for store, one in zip(stores, both, strict=True)]
        expected = torch.cat(rows, dim=1) / 2**0.5
        found = unit(joined.vectors(some, prompt=both[0].prompt(role)))
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)
    assert len(match(texts, runs.student("static", both[0]), both[0], joined)) == 45


def test_stores_of_any_format_are_joined(tmp_path: Path, method: Callable[..., joining.Joined]) -> None:
    two = [write(tmp_path / name, unit(random(width)).float()) for name, width in (("a", 8), ("b", 5))]
    small = [compress(store.path, tmp_path / f"{store.path.name}8", "int8") for store in two]
    plain, found = method(two, tmp_path / "x").store, method(small, tmp_path / "y").store
    rows = [stored(store) for store in (plain, found)]
    torch.testing.assert_close(*(one @ one.T for one in rows), rtol=0, atol=0.05)
    assert plain.fingerprint != found.fingerprint
    assert len(compress(found.path, tmp_path / "z", "int8")) == COUNT


# The store


def test_the_fingerprint_names_method_weights_texts_and_teachers(two: list[Store], tmp_path: Path) -> None:
    made = {
        "base": procrustes_mean(two, tmp_path / "1"),
        "method": concatenate(two, tmp_path / "2", width=8),
        "weights": procrustes_mean(two, tmp_path / "3", weights=(2.0, 1.0)),
        "a little": procrustes_mean(two, tmp_path / "9", weights=(1.0001, 1.0)),
        "width": concatenate(two, tmp_path / "4", width=6),
        "order": procrustes_mean(two[::-1], tmp_path / "5"),
        "texts": procrustes_mean(two, tmp_path / "6", keys=[text_keys(names()[:50])] * 2),
        "teachers": procrustes_mean([two[0], write(tmp_path / "c", random(5))], tmp_path / "7"),
    }
    prints = {name: str(joined.store.fingerprint) for name, joined in made.items()}
    assert len(set(prints.values())) == len(prints)
    again = procrustes_mean(two, tmp_path / "8", weights=(0.5, 0.5))
    assert again.store.fingerprint == made["base"].store.fingerprint
    assert made["base"].store.fingerprint["joined"] == "procrustes mean"


def test_other_vectors_of_a_further_teacher_are_another_store(tiny_model: Any, tmp_path: Path) -> None:
    """The first teacher has one key for a text in both roles, the second has two."""
    first, second = (
        runs.teacher(tiny_model("bert", layers=2)),
        runs.teacher(tiny_model("mpnet", layers=2, prompts={"query": "q: "})),
    )
    texts, joined = runs.texts(20), {}
    for role in ("query", "document"):
        stores = [embed(texts, one, tmp_path / one.name.rpartition("/")[2], role=role) for one in (first, second)]
        joined[role] = concatenate(stores, keys=[keys_by_role({role: texts}, one) for one in (first, second)]).store
    assert joined["query"].path != joined["document"].path
    expected = unit(joined["document"].vectors(texts))[:, first.width :] * 2**0.5
    torch.testing.assert_close(expected, unit(second.encode(texts, role="document")), rtol=0, atol=4e-3)


def test_what_stands_already_is_not_written_again(
    two: list[Store], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = procrustes_mean(two)
    assert first.store.path.parent == two[0].path.parent
    monkeypatch.setattr(joined_stores, "write_store", None)
    again = procrustes_mean(two)
    assert again.store.path == first.store.path
    assert str(again) == str(first)
    monkeypatch.undo()
    with pytest.raises(RecipeError, match="is there already"):
        procrustes_mean(two, first.store.path, weights=(2.0, 1.0))


def test_no_encoder_reads_or_adds_to_a_joined_store(tiny_bert: Path, tmp_path: Path) -> None:
    teacher = runs.teacher(tiny_bert)
    stores = [embed(runs.texts(20), teacher, tmp_path / "a"), write(tmp_path / "b", random(5, 20), runs.texts(20))]
    joined = procrustes_mean(stores, tmp_path / "new").store
    with pytest.raises(IntegrityError, match=r"another encoder(.|\n)*joined: store procrustes mean"):
        embed(runs.texts(20), teacher, joined.path)


@pytest.mark.parametrize(
    ("weights", "keys", "message"),
    [
        ((1.0,), None, "2 stores have 2 weights of 0 or more"),
        ((1.0, -1.0), None, "got 1.0 -1.0"),
        ((0.0, 0.0), None, "one of them above 0"),
        ((1.0, float("nan")), None, "2 weights of 0 or more"),
        (None, [text_keys(["text 1"])], "got 1 keys"),
        (None, [text_keys(["text 1"]), text_keys(["text 1", "text 2"])], "got 1, 2 keys"),
    ],
)
def test_what_cannot_be_joined_is_refused(
    two: list[Store], tmp_path: Path, weights: Any, keys: Any, message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        procrustes_mean(two, tmp_path / "new", weights=weights, keys=keys)
    with pytest.raises(RecipeError, match="two stores or more"):
        procrustes_mean(two[:1], tmp_path / "new")
    with pytest.raises(RecipeError, match="the method gram needs a width"):
        join_stores(two, "gram", None, None, None, tmp_path / "new")
    with pytest.raises(RecipeError, match="procrustes has the first teacher's"):
        join_stores(two, "procrustes", None, 8, None, tmp_path / "new")
    for width in (0, 14):
        with pytest.raises(RecipeError, match=rf"are 13 wide together: width is 1\.\.13, got {width}"):
            concatenate(two, tmp_path / "new", width=width)
    with pytest.raises(RecipeError, match="are 8 wide together"):
        concatenate(two, tmp_path / "new", width=9, weights=(1.0, 0.0))


def test_a_join_that_is_killed_leaves_no_store_and_the_next_cleans_up(two: list[Store], tmp_path: Path) -> None:
    program = f"""
import os, signal
from pathlib import Path
from distill.store import Store
from distill.joining import procrustes_mean
append = Store.append
Store.append = lambda self, rows: (append(self, rows), os.kill(os.getpid(), signal.SIGKILL))
procrustes_mean([Store.open(path) for path in {[str(store.path) for store in two]!r}], {str(tmp_path / "new")!r})
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    done = subprocess.run([sys.executable, "-c", program], env=environment, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "new").exists()
    assert len([*tmp_path.glob(".new.*")]) == 1
    assert len(procrustes_mean(two, tmp_path / "new").store) == COUNT
    assert [*tmp_path.glob(".new.*")] == []


def test_a_map_is_the_same_whatever_the_sign_of_an_eigenvector(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = unit(random(6)).T @ unit(random(6))
    expected, eigh = principal_directions(moments, 4), torch.linalg.eigh

    class Flipped:
        def __init__(self, given: Tensor):
            self.eigenvectors = -eigh(given).eigenvectors

    monkeypatch.setattr(alignment.torch.linalg, "eigh", Flipped)
    assert torch.equal(principal_directions(moments, 4), expected)


# From texts to a student


def test_the_lines_of_the_module_train_a_student(tiny_bert: Path, tiny_model: Any, tmp_path: Path) -> None:
    """Executed as they stand in its text: another width, another tokenizer, other prompts."""
    lines = [line[4:] for line in (joining.__doc__ or "").splitlines() if line.startswith("    ")]
    code = "\n".join(lines)
    prompts = {"prompts": {"query": "q: "}, "default_prompt_name": "query"}
    space: dict[str, Any] = {
        **vars(joining),
        **{
            "embed": embed,
            "match": match,
            "train": train,
            "TrainConfig": TrainConfig,
            "CosineDistance": CosineDistance,
        },
        "teachers": [runs.teacher(tiny_bert), runs.teacher(tiny_model("qwen", head=[], **prompts))],
        "paths": [tmp_path / "a", tmp_path / "b"],
        "texts": runs.texts(60),
        "student": runs.student("layers", runs.teacher(tiny_bert)),
        "output": tmp_path / "run",
    }
    before = space["student"].encode(space["texts"])
    exec(code, space)
    assert len([line for line in code.splitlines() if line]) == 5
    assert len(space["target"]) == 60
    target = space["target"].vectors(space["texts"])
    after = space["run"].student.encode(space["texts"])
    start, end = (torch.nn.functional.cosine_similarity(rows, target).mean() for rows in (before, after))
    assert end > start + 0.02


# The command


def command(capsys: pytest.CaptureFixture, *arguments: object) -> tuple[int, str, str]:
    code = teachers.main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def test_the_command_joins_stores(two: list[Store], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    paths = [store.path for store in two]
    code, out, _ = command(capsys, *paths, "--weights", 3, 1, "--output", tmp_path / "p")
    assert code == 0
    assert "60 vectors of width 8; 0 texts left out, 0 set aside" in out
    expected = procrustes_mean(two, tmp_path / "q", weights=(3.0, 1.0)).store
    assert torch.equal(Store.open(tmp_path / "p").vectors(names()), expected.vectors(names()))
    assert command(capsys, *paths, "--method", "concatenate", "--output", tmp_path / "c")[0] == 0
    assert Store.open(tmp_path / "c").width == 13
    assert command(capsys, *paths, "--method", "gram", "--width", 4, "--output", tmp_path / "g")[0] == 0
    assert Store.open(tmp_path / "g").width == 4
    for arguments, message in (
        (["--method", "gram", "--output", tmp_path / "x"], "gram needs a width"),
        (["--width", 4, "--output", tmp_path / "x"], "a width is of the methods gram"),
        (["--texts", "a.txt", "--output", tmp_path / "x"], "go together"),
        (["--output", tmp_path / "g"], "is there already"),
    ):
        code, _, err = command(capsys, *paths, *arguments)
        assert (code, message in err) == (2, True), err
    assert command(capsys, tmp_path / "a", tmp_path / "nothing", "--output", tmp_path / "x")[0] == 4


def test_the_command_joins_by_text_where_prompts_differ(
    tiny_model: Any, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folders = [tiny_model("bert", layers=2, prompts={"query": "find: "}), tiny_model("mpnet", layers=2)]
    encoders = [Encoder.from_pretrained(folder) for folder in folders]
    for encoder, name in zip(encoders, "ab", strict=True):
        embed(runs.texts(20), encoder, tmp_path / name, role="query")
    (tmp_path / "queries.txt").write_text("\n".join(runs.texts(20)))
    arguments = [tmp_path / "a", tmp_path / "b", "--queries", tmp_path / "queries.txt", "--output", tmp_path / "new"]
    code, out, _ = command(capsys, *arguments, "--teachers", *folders)
    assert code == 0
    assert "20 vectors of width 32; 0 texts left out" in out
    code, _, err = command(capsys, *arguments, "--teachers", *folders[::-1])
    assert code == 2
    assert "in the order of their stores" in err
