"""A model that gets texts end to end gives what it gives with padding, or is not run so."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import runs
import tiny
import torch
from test_unpadded import of_lengths, run
from torch import Tensor

from distill.encoder import Encoder
from distill.modules import Pooling, TransformerBackbone
from distill.training import TrainConfig, execution
from distill.unpadded import attention

CPU = torch.device("cpu")
LENGTHS = [1, 9, 3, 0, 2, 30]
TAKES = (tiny.bert, tiny.roberta, tiny.modernbert, tiny.qwen, tiny.distilbert, tiny.albert)
REFUSED = (tiny.mpnet, tiny.t5)  # their attention adds a bias by distance, and is their own


@pytest.fixture
def end_to_end(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Switches it on for the CPU, with attention text by text, or off."""

    def switch(on: bool) -> None:
        monkeypatch.setattr(attention, "kernel_for", lambda device: attention.text_by_text if on else None)

    switch(True)
    return switch


def places(encoder: Encoder) -> tuple[int, int]:
    assert isinstance(encoder.backbone, TransformerBackbone)
    reading = encoder.backbone.take_reading()
    return reading.tokens, reading.places


@pytest.mark.parametrize("kind", TAKES, ids=lambda kind: kind.__name__)
def test_vectors_and_gradients_are_those_with_padding(
    kind: Callable[[Path], Path], tmp_path: Path, end_to_end: Callable[[bool], None]
) -> None:
    encoder = Encoder.from_pretrained(kind(tmp_path / "model"), max_length=64).double()
    tokens = of_lengths(encoder, LENGTHS)
    vectors, gradients, _ = run(encoder, tokens)
    assert places(encoder) == (45, 46)  # the text without tokens takes a place
    end_to_end(False)
    plain_vectors, plain_gradients, _ = run(encoder, tokens)
    assert places(encoder) == (45, 6 * 30)
    torch.testing.assert_close(vectors, plain_vectors, rtol=1e-9, atol=1e-10)
    assert gradients.keys() == plain_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, plain_gradients[name], rtol=1e-7, atol=1e-9, msg=name)


@pytest.mark.parametrize("kind", REFUSED, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("claimed", [False, True], ids=["as it says", "by trial"])
def test_a_model_that_gives_something_else_is_run_with_padding(
    kind: Callable[[Path], Path],
    claimed: bool,
    tmp_path: Path,
    end_to_end: Callable[[bool], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encoder = Encoder.from_pretrained(kind(tmp_path / "model"), max_length=64)
    assert isinstance(encoder.backbone, TransformerBackbone)
    monkeypatch.setattr(type(encoder.backbone.model), "_supports_attention_backend", claimed)
    tokens = of_lengths(encoder, LENGTHS)
    vectors, *_ = run(encoder, tokens)
    assert places(encoder) == (45, 6 * 30)
    end_to_end(False)
    assert torch.equal(vectors, run(encoder, tokens)[0])


@pytest.mark.parametrize(("kind", "first"), [("bert", 0), ("roberta", 1), ("qwen", 0), ("modernbert", 0)])
def test_the_first_position_is_found_and_a_wrong_one_would_be_noticed(
    kind: str, first: int, tiny_model: Callable[..., Path], end_to_end: Callable[[bool], None]
) -> None:
    encoder = Encoder.from_pretrained(tiny_model(kind))
    model = encoder.backbone.model  # type: ignore[union-attr]
    texts = attention.end_to_end(model, torch.tensor([3, 4]), CPU, pad_id=0)
    assert texts is not None
    assert texts.positions.tolist() == [[first + place for place in (0, 1, 2, 0, 1, 2, 3)]]
    ids = torch.arange(10, 17)
    wrong = attention.Texts(model, torch.tensor([3, 4]), CPU, kernel=attention.text_by_text, first_position=1 - first)
    together = attention.Texts(model, torch.tensor([7]), CPU, kernel=attention.text_by_text, first_position=first)
    right = texts.run(ids)
    if kind in ("bert", "roberta"):  # rotary positions have no first
        assert (wrong.run(ids) - right).norm() > 10 * attention.TOLERANCE * right.norm()
    assert (together.run(ids) - right).norm() > 10 * attention.TOLERANCE * right.norm()


def test_layers_that_are_run_again_see_the_same_texts(tiny_bert: Path, end_to_end: Callable[[bool], None]) -> None:
    encoder = Encoder.from_pretrained(tiny_bert)
    tokens = of_lengths(encoder, LENGTHS)
    vectors, gradients, _ = run(encoder, tokens)
    with execution.as_asked(encoder, TrainConfig(gradient_checkpointing=True)):
        again_vectors, again_gradients, _ = run(encoder, tokens)
    assert torch.equal(vectors, again_vectors)
    assert all(torch.equal(gradient, again_gradients[name]) for name, gradient in gradients.items())


def test_the_trial_leaves_no_weight_without_gradient_in_autocast(
    tiny_bert: Path, end_to_end: Callable[[bool], None]
) -> None:
    encoder = Encoder.from_pretrained(tiny_bert)
    tokens = of_lengths(encoder, LENGTHS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, gradients, _ = run(encoder, tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, again, _ = run(encoder, tokens)
    assert gradients.keys() == again.keys()
    assert all(torch.equal(gradient, again[name]) for name, gradient in gradients.items())


def test_a_model_keeps_its_own_attention(tiny_bert: Path, end_to_end: Callable[[bool], None]) -> None:
    encoder = Encoder.from_pretrained(tiny_bert)
    model = encoder.backbone.model  # type: ignore[union-attr]
    before = model.config._attn_implementation
    run(encoder, of_lengths(encoder, LENGTHS))
    assert model.config._attn_implementation == before != attention.NAME
    texts = attention.end_to_end(model, torch.tensor([3]), CPU, pad_id=0)
    assert texts is not None
    with pytest.raises(IndexError):
        texts.run(torch.tensor([1, 2, 10**6]))
    assert model.config._attn_implementation == before
    model.config._attn_implementation = attention.NAME
    with pytest.raises(ValueError, match="attention over texts end to end"):
        model(input_ids=torch.tensor([[1, 2]]))


@pytest.mark.parametrize("reason", ["dropout", "compiled", "no positions", "fails"])
def test_padding_stays_where_it_has_to(
    reason: str, tiny_bert: Path, end_to_end: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = Encoder.from_pretrained(tiny_bert)
    model = encoder.backbone.model  # type: ignore[union-attr]
    if reason == "dropout":
        model.train()
    elif reason == "compiled":
        model._compiled_call_impl = model.forward
    elif reason == "no positions":
        monkeypatch.setattr(model, "forward", lambda input_ids, attention_mask: model.wrong)
    else:
        monkeypatch.setattr(attention, "kernel_for", lambda device: fails)
    assert attention.end_to_end(model, torch.tensor([3, 4]), CPU, pad_id=0) is None


def fails(*_: Any, **__: Any) -> Tensor:
    raise RuntimeError("heads are a multiple of 8 wide")


def test_the_cpu_and_float32_have_no_kernel() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert attention.kernel_for(CPU) is None


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("reach", [None, 0, 2])
def test_a_token_sees_its_text_as_far_as_it_reaches(causal: bool, reach: int | None) -> None:
    query, key, value = torch.randn(3, 9, 2, 8).double()
    lengths = [4, 1, 4]
    found = attention.text_by_text(query, key, value, of(lengths, CPU), scale=0.3, causal=causal, reach=reach)
    torch.testing.assert_close(found, naive(query, key, value, lengths, 0.3, causal, reach))


def of(lengths: list[int], device: torch.device) -> attention.Texts:
    return attention.Texts(None, torch.tensor(lengths), device, kernel=attention.text_by_text)


def naive(
    query: Tensor, key: Tensor, value: Tensor, lengths: list[int], scale: float, causal: bool, reach: int | None
) -> Tensor:
    """Row by row, by the definition."""
    owner = [text for text, length in enumerate(lengths) for _ in range(length)]
    rows = torch.zeros_like(query)
    for i in range(len(owner)):
        sees = [
            j
            for j in range(len(owner))
            if owner[i] == owner[j] and (reach is None or abs(i - j) <= reach) and not (causal and j > i)
        ]
        for head in range(query.shape[1]):
            weights = (scale * key[sees, head] @ query[i, head]).softmax(0)
            rows[i, head] = weights @ value[sees, head]
    return rows


# What follows needs a GPU: pytest -m gpu.


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("reach", [None, 2])
def test_flash_attention_is_the_same(causal: bool, reach: int | None) -> None:
    cuda = torch.device("cuda")
    lengths = [4, 1, 40]
    inputs = [torch.randn(45, 4, 32, device=cuda, requires_grad=True) for _ in range(3)]
    found = {}
    for kernel in (attention.flash, attention.text_by_text):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            output = kernel(*inputs, of(lengths, cuda), scale=0.2, causal=causal, reach=reach)
        found[kernel.__name__] = [output, *torch.autograd.grad(output.float().square().sum(), inputs)]
    for one, other in zip(*found.values(), strict=True):
        torch.testing.assert_close(one.float(), other.float(), rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", TAKES, ids=lambda kind: kind.__name__)
def test_vectors_on_a_gpu_in_bf16_are_those_with_padding(
    kind: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = Encoder.from_pretrained(kind(tmp_path / "model"), max_length=64, compute_dtype="bfloat16").cuda()
    tokens = of_lengths(encoder, LENGTHS)
    assert isinstance(encoder.backbone, TransformerBackbone)
    encoder.backbone.pooling = Pooling(tiny.WIDTH)
    with torch.no_grad():
        vectors = encoder.compute(tokens)
        assert places(encoder) == (45, 46)
        exact = encoder(tokens)  # float32, with padding
        monkeypatch.setattr(attention, "kernel_for", lambda device: None)
        padded = encoder.compute(tokens)
    assert places(encoder) == (90, 2 * 6 * 30)
    assert 1 - torch.nn.functional.cosine_similarity(vectors[:3], padded[:3]).min() < 1e-3
    assert (vectors - exact).norm() < 2 * (padded - exact).norm() + 1e-3


@pytest.mark.gpu
def test_a_run_in_bf16_on_a_gpu_ends_near_the_padded_one(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common: dict[str, Any] = {"store": tmp_path / "store", "steps": 7, "bank_size": 16, "mixed_precision": "bf16"}
    packed = runs.small_run(tiny_bert, tmp_path / "packed", **common)
    monkeypatch.setattr(attention, "kernel_for", lambda device: None)
    padded = runs.small_run(tiny_bert, tmp_path / "padded", **common)
    for name, value in runs.weights(packed).items():
        torch.testing.assert_close(torch.tensor(value), torch.tensor(runs.weights(padded)[name]), rtol=0, atol=5e-2)
