"""Whose vectors a store holds: every field of the fingerprint counts, and nothing else does."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import runs
import torch

from distill.embed import embed, embed_vocabulary, job
from distill.encoder import Encoder
from distill.errors import IntegrityError
from distill.modules import Tokens
from distill.store import Store, verify

TEXTS = runs.texts(30)
CONFIG = "0" * 64  # a hash that another release of transformers might have given


@pytest.fixture
def teacher(tiny_bert: Path) -> Encoder:
    return runs.teacher(tiny_bert)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many texts each forward pass computed."""
    counts, compute = [], Encoder.compute

    def counting(self: Encoder, tokens: Tokens) -> torch.Tensor:
        counts.append(len(tokens))
        return compute(self, tokens)

    monkeypatch.setattr(Encoder, "compute", counting)
    return counts


def changed_folder(model: Path, target: Path, file: str, **change: Any) -> Encoder:
    shutil.copytree(model, target)
    value = json.loads((target / file).read_text())
    (target / file).write_text(json.dumps(value | change))
    return runs.teacher(target)


def _weights(model: Path, folder: Path) -> Encoder:
    encoder = runs.teacher(model)
    with torch.no_grad():
        next(encoder.backbone.parameters())[7, 3] += 1e-4
    return encoder


def _tokenizer(model: Path, folder: Path) -> Encoder:
    encoder = runs.teacher(model)
    encoder.tokenizer.backend_tokenizer.normalizer = None
    return encoder


def _config(model: Path, folder: Path) -> Encoder:
    return changed_folder(model, folder / "changed", "config.json", num_attention_heads=2)


def _modules(model: Path, folder: Path) -> Encoder:
    modes = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    return changed_folder(model, folder / "changed", "1_Pooling/config.json", **modes)


def _max_length(model: Path, folder: Path) -> Encoder:
    return Encoder.from_pretrained(model, max_length=32)


def _lowercase(model: Path, folder: Path) -> Encoder:
    settings = {"do_lower_case": True}
    return changed_folder(model, folder / "changed", "sentence_bert_config.json", **settings)


def _compute_dtype(model: Path, folder: Path) -> Encoder:
    return Encoder.from_pretrained(model, compute_dtype="bfloat16")


CHANGES: dict[str, Callable[[Path, Path], Encoder]] = {
    "weights": _weights,
    "tokenizer": _tokenizer,
    "config": _config,
    "modules": _modules,
    "max_length": _max_length,
    "lowercase": _lowercase,
    "compute_dtype": _compute_dtype,
}


def test_every_field_has_a_change(teacher: Encoder) -> None:
    assert set(CHANGES) == set(teacher.fingerprint())


@pytest.mark.parametrize("field", CHANGES)
def test_a_field_changed_alone_is_named_and_forces_a_rebuild(
    field: str, teacher: Encoder, tiny_bert: Path, tmp_path: Path, counted: list[int]
) -> None:
    other = CHANGES[field](tiny_bert, tmp_path)
    before, after = teacher.fingerprint(), other.fingerprint()
    assert [name for name in before if before[name] != after[name]] == [field]
    embed(TEXTS, teacher, tmp_path / "store")
    with pytest.raises(
        IntegrityError, match=f"holds the vectors of another encoder. What differs:\n  {field}: [^\n]*\n[^ ]"
    ):
        embed(TEXTS, other, tmp_path / "store")
    counted.clear()
    embed(TEXTS, other, tmp_path / "another")
    assert sum(counted) == len(TEXTS)
    assert "equal_configs" not in json.loads((tmp_path / "store" / "manifest.json").read_text())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_batches_order_and_device_are_full_hits(
    teacher: Encoder, tmp_path: Path, counted: list[int], monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    store = embed(TEXTS, teacher, tmp_path / "store")
    expected = store.vectors(TEXTS)
    counted.clear()
    monkeypatch.setattr(job, "BATCH_TOKENS", 64)
    monkeypatch.setattr(job, "WINDOW", 8)
    again = embed(TEXTS[::-1], teacher.to(device), tmp_path / "store")
    assert counted == []
    assert torch.equal(again.vectors(TEXTS), expected)


# The same configuration in other words


def written_by_another_release(path: Path) -> None:
    """The store as a release that describes the configuration differently would have written it."""
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["fingerprint"]["config"] = CONFIG
    (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("store_as", [None, "int8", "pca-16-int8"])
def test_the_vectors_decide_where_only_the_configuration_is_described_differently(
    teacher: Encoder, tmp_path: Path, counted: list[int], capsys: pytest.CaptureFixture, store_as: str | None
) -> None:
    path = tmp_path / "store"
    expected = embed(TEXTS, teacher, path, store_as=store_as).vectors(TEXTS)
    written_by_another_release(path)
    counted.clear()
    store = embed([*TEXTS, "one more"], teacher, path)
    assert sum(counted) <= 32 + 1
    assert torch.equal(store.vectors(TEXTS), expected)
    assert store.fingerprint["config"] == CONFIG  # runs that were begun on it go on
    assert "are the same (to " in capsys.readouterr().err
    counted.clear()
    assert len(embed(TEXTS, teacher, path)) == len(store)
    assert counted == []  # it is asked once
    assert verify(path) == {}
    assert len(Store.open(path, teacher.fingerprint())) == len(store)


def test_nothing_stored_that_could_be_compared_is_refused(teacher: Encoder, tmp_path: Path) -> None:
    embed(TEXTS, teacher, tmp_path)
    written_by_another_release(tmp_path)
    with pytest.raises(IntegrityError, match=r"config: .*\n.*here none is stored, or they differ"):
        embed(["not there"], teacher, tmp_path)


def test_another_configuration_is_refused_though_it_is_described_differently(
    teacher: Encoder, tiny_bert: Path, tmp_path: Path
) -> None:
    embed(TEXTS, teacher, tmp_path / "store")
    written_by_another_release(tmp_path / "store")
    with pytest.raises(IntegrityError, match="config: store 000000000000"):
        embed(TEXTS, _config(tiny_bert, tmp_path), tmp_path / "store")


def test_the_store_in_the_cache_is_found_again(
    teacher: Encoder, tiny_bert: Path, tmp_path: Path, counted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTILL_HOME", str(tmp_path / "home"))
    path = embed(TEXTS, teacher).path
    earlier = path.with_name(path.name[:-12] + "0" * 12)
    path.rename(earlier)
    written_by_another_release(earlier)
    counted.clear()
    assert embed(TEXTS, teacher).path == earlier
    assert sum(counted) <= len(TEXTS)
    assert not path.exists()
    assert embed(TEXTS, teacher, store_as="int8").path not in (path, earlier)
    other = changed_folder(tiny_bert, tmp_path / tiny_bert.name, "config.json", num_attention_heads=2)
    assert embed(TEXTS, other).path not in (path, earlier)


def test_token_vectors_are_recognized_too(teacher: Encoder, tmp_path: Path, counted: list[int]) -> None:
    expected = embed_vocabulary(teacher, tmp_path)
    written_by_another_release(tmp_path)
    counted.clear()
    teacher.train()
    teacher.backbone.model.embeddings.eval()
    modes = [module.training for module in teacher.modules()]
    assert torch.equal(embed_vocabulary(teacher, tmp_path), expected)
    assert sum(counted) == 32
    assert [module.training for module in teacher.modules()] == modes


@pytest.mark.parametrize("equal", [3, [3], ["x"], {"a": 1}])
def test_what_cannot_be_equal_configs_is_a_damaged_manifest(teacher: Encoder, tmp_path: Path, equal: Any) -> None:
    embed(TEXTS, teacher, tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"equal_configs": equal}))
    with pytest.raises(IntegrityError, match="equal_configs"):
        Store.open(tmp_path)
