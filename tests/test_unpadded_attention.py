"""A model that gets texts end to end gives what it gives with padding, or is not run so."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import runs
import tiny
import torch
from test_unpadded import of_lengths, run
from torch import Tensor

from distill.embed import embed
from distill.encoder import Encoder
from distill.modules import Pooling, Tokens, TransformerBackbone
from distill.students.choosing import choose_layers
from distill.training import TrainConfig, execution
from distill.unpadded import attention, trial

CPU = torch.device("cpu")
IDS = torch.arange(10, 17)
LENGTHS = [1, 9, 3, 0, 2, 30, 30]  # more in all than a tiny model has positions
TAKES = (tiny.bert, tiny.roberta, tiny.modernbert, tiny.qwen, tiny.distilbert, tiny.albert)


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
    assert places(encoder) == (75, 76)  # the text without tokens takes a place
    end_to_end(False)
    plain_vectors, plain_gradients, _ = run(encoder, tokens)
    assert places(encoder) == (75, 7 * 30)
    torch.testing.assert_close(vectors, plain_vectors, rtol=1e-9, atol=1e-10)
    assert gradients.keys() == plain_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, plain_gradients[name], rtol=1e-7, atol=1e-9, msg=name)


@pytest.mark.parametrize("why", ["mpnet", "mpnet, which claims otherwise", "t5", "attention by chunks"])
def test_a_model_that_gives_something_else_is_run_with_padding(
    why: str, tiny_model: Callable[..., Path], end_to_end: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = why.partition(",")[0]
    encoder = Encoder.from_pretrained(tiny_model(name if name in ("mpnet", "t5") else "bert"))
    model = encoder.backbone.model  # type: ignore[union-attr]
    if "claims" in why:  # its attention adds a bias by distance, and looks at every token
        monkeypatch.setattr(type(model), "_supports_attention_backend", True)
    if "chunks" in why:
        model.config.attention_chunk_size = 8192
    tokens = of_lengths(encoder, LENGTHS)
    vectors, *_ = run(encoder, tokens)
    assert places(encoder) == (75, 7 * 30)
    end_to_end(False)
    assert torch.equal(vectors, run(encoder, tokens)[0])


@pytest.mark.parametrize("wrong", ["zeros", "no gradient"])
def test_a_kernel_that_gives_something_else_is_not_used(
    wrong: str, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kernel(*parts: Any, **options: Any) -> Tensor:
        output = attention.text_by_text(*parts, **options)
        return output * 0 if wrong == "zeros" else output.detach()

    monkeypatch.setattr(attention, "kernel_for", lambda device: kernel)
    model = Encoder.from_pretrained(tiny_bert).backbone.model  # type: ignore[union-attr]
    assert trial.end_to_end(model, IDS, torch.tensor([3, 4]), CPU, pad_id=0) is None


class Keeping(torch.autograd.Function):
    """Attention text by text that keeps what torch's operator keeps for its backward pass: no tensor of inference mode."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, texts: attention.Texts, options: Any) -> Tensor:
        ctx.save_for_backward(query, key, value, texts.edges)
        ctx.texts, ctx.options = texts, options
        return attention.text_by_text(query, key, value, texts, **options)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        inputs = [part.detach().requires_grad_() for part in ctx.saved_tensors[:3]]
        with torch.enable_grad():
            output = attention.text_by_text(*inputs, ctx.texts, **ctx.options)  # type: ignore[arg-type]
        return *torch.autograd.grad(output, inputs, gradients), None, None


def test_a_teacher_that_embeds_is_tried_where_gradients_can_be_had(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def kernel(query: Tensor, key: Tensor, value: Tensor, texts: attention.Texts, **options: Any) -> Tensor:
        return Keeping.apply(query, key, value, texts, options)  # type: ignore[no-any-return]

    teacher = Encoder.from_pretrained(tiny_bert)
    padded = embed(runs.texts(20), teacher, tmp_path / "padded").vectors(runs.texts(20))
    assert "; 36.7% padding" in capsys.readouterr().err
    monkeypatch.setattr(attention, "kernel_for", lambda device: kernel)
    vectors = embed(runs.texts(20), teacher, tmp_path / "store").vectors(runs.texts(20))
    assert "; 0.0% padding" in capsys.readouterr().err
    torch.testing.assert_close(vectors, padded, rtol=0, atol=2e-3)


def test_layers_are_chosen_by_a_teacher_that_is_tried_only_now(
    tiny_bert: Path, end_to_end: Callable[[bool], None]
) -> None:
    vectors = Encoder.from_pretrained(tiny_bert).encode(runs.texts(20))
    found = choose_layers(Encoder.from_pretrained(tiny_bert), 2, texts=runs.texts(20), vectors=vectors)
    end_to_end(False)
    padded = choose_layers(Encoder.from_pretrained(tiny_bert), 2, texts=runs.texts(20), vectors=vectors)
    assert found.layers == padded.layers
    assert found.tried == pytest.approx(padded.tried, abs=1e-5)


@pytest.mark.parametrize(("kind", "first"), [("bert", 0), ("roberta", 1), ("qwen", 0), ("modernbert", 0)])
def test_the_first_position_is_found_and_a_wrong_one_would_be_noticed(
    kind: str, first: int, tiny_model: Callable[..., Path], end_to_end: Callable[[bool], None]
) -> None:
    model = Encoder.from_pretrained(tiny_model(kind)).backbone.model  # type: ignore[union-attr]
    texts = trial.end_to_end(model, IDS, torch.tensor([3, 4]), CPU, pad_id=0)
    assert texts is not None
    assert texts.positions.tolist() == [first + place for place in (0, 1, 2, 0, 1, 2, 3)]
    right = texts.run()
    texts.positions += 1 - 2 * first
    if kind in ("bert", "roberta"):  # rotary positions have no first
        assert (texts.run() - right).norm() > 10 * trial.TOLERANCE * right.norm()
    as_one = trial.end_to_end(model, IDS, torch.tensor([7]), CPU, pad_id=0)
    assert as_one is not None
    assert (as_one.run() - right).norm() > 10 * trial.TOLERANCE * right.norm()


@pytest.mark.parametrize("padding", [-1, 10**6])
def test_a_config_whose_pad_token_is_none_is_no_obstacle(
    padding: int, tiny_bert: Path, end_to_end: Callable[[bool], None]
) -> None:
    model = Encoder.from_pretrained(tiny_bert).backbone.model  # type: ignore[union-attr]
    model.config.pad_token_id = padding
    assert trial.end_to_end(model, IDS, torch.tensor([3, 4]), CPU, pad_id=0) is not None


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_a_pad_token_within_a_text_is_what_it_is_with_padding(
    kind: str, tiny_model: Callable[..., Path], end_to_end: Callable[[bool], None]
) -> None:
    encoder = Encoder.from_pretrained(tiny_model(kind))
    tokens = Tokens.from_lists([[10, 0, 11, 12], [13, 14]])
    vectors, *_ = run(encoder, tokens)
    end_to_end(False)
    torch.testing.assert_close(vectors, run(encoder, tokens)[0])


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
    texts = trial.end_to_end(model, torch.tensor([1, 2, 10**6]), torch.tensor([3]), CPU, pad_id=0)
    assert texts is not None
    with pytest.raises(IndexError):
        texts.run()
    assert model.config._attn_implementation == before
    with texts, texts:
        pass
    assert model.config._attn_implementation == before
    model.config._attn_implementation = attention.NAME
    with pytest.raises(ValueError, match="choose another with set_attn_implementation"):
        model(input_ids=torch.tensor([[1, 2]]))


def test_threads_wait_for_one_another(tiny_bert: Path, end_to_end: Callable[[bool], None]) -> None:
    encoder = Encoder.from_pretrained(tiny_bert)
    tokens = of_lengths(encoder, LENGTHS)
    model = encoder.backbone.model  # type: ignore[union-attr]
    with torch.no_grad(), ThreadPoolExecutor(4) as threads:
        expected, before = encoder(tokens), model.config._attn_implementation
        for vectors in threads.map(lambda _: encoder(tokens).detach(), range(24)):
            assert torch.equal(vectors, expected)
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
def test_want_of_memory_says_nothing_of_a_model(
    error: type[Exception], tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Encoder.from_pretrained(tiny_bert).backbone.model  # type: ignore[union-attr]

    def fails(*_: Any, **__: Any) -> Tensor:
        raise error("heads are a multiple of 8 wide")

    def ask() -> Any:
        return trial.end_to_end(model, IDS, torch.tensor([3, 4]), CPU, pad_id=0)

    monkeypatch.setattr(attention, "kernel_for", lambda device: fails)
    with pytest.raises(error) if error is torch.OutOfMemoryError else nullcontext():
        assert ask() is None
    monkeypatch.setattr(attention, "kernel_for", lambda device: attention.text_by_text)
    assert (ask() is None) == (error is RuntimeError)


@pytest.mark.parametrize("reason", ["dropout", "compiled", "no positions"])
def test_padding_stays_where_it_has_to(
    reason: str, tiny_bert: Path, end_to_end: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Encoder.from_pretrained(tiny_bert).backbone.model  # type: ignore[union-attr]
    if reason == "dropout":
        model.train()
    elif reason == "compiled":
        model._compiled_call_impl = model.forward
    else:
        monkeypatch.setattr(model, "forward", lambda input_ids, attention_mask: None)
    assert trial.end_to_end(model, IDS, torch.tensor([3, 4]), CPU, pad_id=0) is None


def test_the_cpu_has_no_kernel_and_float32_has_none() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert attention.kernel_for(CPU) is None
    assert attention.kernel_for(torch.device("cuda")) is None


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("reach", [None, 0, 2])
def test_a_token_sees_its_text_as_far_as_it_reaches(causal: bool, reach: int | None) -> None:
    query, key, value = torch.randn(3, 9, 4, 8).double()
    lengths = [4, 1, 4]
    found = attention.text_by_text(query, key, value, of(lengths, CPU), scale=0.3, causal=causal, reach=reach)
    torch.testing.assert_close(found, naive(query, key, value, lengths, 0.3, causal, reach))
    shared = attention.text_by_text(
        query, key[:, :2], value[:, :2], of(lengths, CPU), scale=0.3, causal=causal, reach=reach
    )
    key, value = (part[:, [0, 0, 1, 1]] for part in (key, value))
    torch.testing.assert_close(shared, naive(query, key, value, lengths, 0.3, causal, reach))


def of(lengths: list[int], device: torch.device) -> attention.Texts:
    ids = torch.zeros(sum(lengths), dtype=torch.int64)
    return attention.Texts(None, ids, torch.tensor(lengths), device, kernel=attention.text_by_text)


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
@pytest.mark.parametrize("shared", [1, 4], ids=["", "shared keys"])
def test_flash_attention_is_the_same(causal: bool, reach: int | None, shared: int) -> None:
    cuda = torch.device("cuda")
    lengths = [4, 1, 40]
    inputs = [torch.randn(45, heads, 32, device=cuda, requires_grad=True) for heads in (4, 4 // shared, 4 // shared)]
    found = {}
    for kernel in (attention.flash, attention.text_by_text):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            output = kernel(*inputs, of(lengths, cuda), scale=0.2, causal=causal, reach=reach)
        found[kernel.__name__] = [output, *torch.autograd.grad(output.float().square().sum(), inputs)]
    for one, other in zip(*found.values(), strict=True):
        assert (
            one.float() - other.float()
        ).norm() <= 2e-2 * other.float().norm()  # in bf16, entries near 0 differ by more


@pytest.mark.gpu
@pytest.mark.parametrize("kind", TAKES, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("again", [False, True], ids=["", "layers run again"])
def test_vectors_and_gradients_on_a_gpu_in_bf16_are_those_with_padding(
    kind: Callable[[Path], Path], again: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if again and kind is tiny.albert:
        pytest.skip("its layers are one layer, and are not run again")
    encoder = Encoder.from_pretrained(kind(tmp_path / "model"), max_length=64).cuda()
    tokens = of_lengths(encoder, LENGTHS)
    assert isinstance(encoder.backbone, TransformerBackbone)
    encoder.backbone.pooling = Pooling(tiny.WIDTH)
    exact = run(encoder, tokens)  # float32, with padding
    with (
        torch.autocast("cuda", dtype=torch.bfloat16),
        execution.as_asked(encoder, TrainConfig(gradient_checkpointing=again)),
    ):
        found = run(encoder, tokens)
        assert places(encoder) == (150, 7 * 30 + 76)
        monkeypatch.setattr(attention, "kernel_for", lambda device: None)
        padded = run(encoder, tokens)
    there = torch.tensor(LENGTHS) > 0
    assert 1 - torch.nn.functional.cosine_similarity(found[0][there], padded[0][there]).min() < 1e-3
    whole = torch.stack([gradient.norm() for gradient in exact[1].values()]).norm()
    for name, gradient in exact[
        1
    ].items():  # some are 0, as a key's bias has; what 16 bits round does not shrink with them
        error, usual = ((one[1][name] - gradient).norm() for one in (found, padded))
        assert error <= 3 * usual + 1e-2 * gradient.norm() + 1e-3 * whole, name


@pytest.mark.gpu
def test_a_run_in_bf16_on_a_gpu_has_no_padding_and_the_losses_of_one_that_has(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common: dict[str, Any] = {"store": tmp_path / "store", "steps": 7, "bank_size": 16, "mixed_precision": "bf16"}
    together = runs.small_run(tiny_bert, tmp_path / "together", kind="layers", **common)
    monkeypatch.setattr(attention, "kernel_for", lambda device: None)
    padded = runs.small_run(tiny_bert, tmp_path / "padded", kind="layers", **common)
    assert together.padding == 0.0
    assert padded.padding
    one, other = (
        [json.loads(line)["loss"] for line in (run.output / "metrics.jsonl").read_text().splitlines()]
        for run in (together, padded)
    )
    assert one == pytest.approx(other, rel=1e-2)
