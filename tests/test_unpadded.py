"""Linear layers that skip padding give what they gave, and multiply the tokens alone."""

import gc
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import runs
import tiny
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from distill.encoder import Encoder
from distill.modules import Tokens
from distill.training import TrainConfig, execution
from distill.unpadded import linear

CPU = torch.device("cpu")
KINDS = (tiny.bert, tiny.mpnet, tiny.qwen, tiny.distilbert, tiny.albert, tiny.t5)


class Products(TorchFunctionMode):
    """Shapes of what is multiplied: entered before `skipping`, it sees what that leaves."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, ...]] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if function is F.linear:
            self.rows.append(tuple(args[0].shape[:-1]))
        return function(*args, **(kwargs or {}))


def of_lengths(encoder: Encoder, lengths: list[int]) -> Tokens:
    whole = encoder.tokenize([" ".join(runs.texts(12))]).tokens.ids.tolist()
    assert max(lengths) <= len(whole)
    return Tokens.from_lists([whole[:length] for length in lengths])


def run(encoder: Encoder, tokens: Tokens) -> tuple[Tensor, dict[str, Tensor], list[tuple[int, ...]]]:
    encoder.zero_grad()
    torch.manual_seed(0)
    with Products() as products:
        vectors = encoder(tokens)
    (vectors * torch.linspace(-1, 1, vectors.numel(), device=vectors.device).view_as(vectors)).sum().backward()
    gradients = {name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None}
    return vectors.detach(), gradients, products.rows


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("dropout", [False, True])
def test_vectors_and_gradients_are_those_with_padding(
    kind: Callable[[Path], Path], dropout: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = Encoder.from_pretrained(kind(tmp_path / "model"), max_length=64).double().train(dropout)
    tokens = of_lengths(encoder, [1, 9, 3, 0, 2, 5])
    vectors, gradients, skipped = run(encoder, tokens)
    monkeypatch.setattr(linear, "FULL", -1)
    plain_vectors, plain_gradients, padded = run(encoder, tokens)
    torch.testing.assert_close(vectors, plain_vectors, rtol=1e-9, atol=1e-10)
    assert gradients.keys() == plain_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, plain_gradients[name], rtol=1e-7, atol=1e-9, msg=name)
    places = 1 + 9 + 3 + 1 + 2 + 5  # the text without tokens is run on a pad token that it sees
    assert (6, 9) in padded
    assert (6, 9) not in skipped
    assert skipped.count((places,)) == padded.count((6, 9))


@pytest.mark.parametrize("lengths", [[4, 4, 4], [3, 1, 2], [10, 10, 9, 10]], ids=["equal", "square", "nearly full"])
def test_what_has_nothing_to_skip_is_left_alone(lengths: list[int], tiny_bert: Path) -> None:
    encoder = Encoder.from_pretrained(tiny_bert)
    *_, rows = run(encoder, of_lengths(encoder, lengths))
    assert (len(lengths), max(lengths)) in rows


def test_an_input_of_query_key_and_value_is_gathered_and_kept_once() -> None:
    hidden, weights = torch.randn(3, 4, 5, requires_grad=True), torch.randn(3, 5, 5, requires_grad=True)
    mask = torch.arange(4) < torch.tensor([[1], [4], [2]])
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = kept.get(tensor.data_ptr(), 0) + 1
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), linear.skipping(mask, CPU):
        outputs = [F.linear(hidden, weight) for weight in weights]
    assert 3 in kept.values()
    for output, weight in zip(outputs, weights, strict=True):
        torch.testing.assert_close(output[mask], (hidden @ weight.T)[mask])
        assert not output[~mask].any()


def test_an_input_that_was_changed_in_place_is_gathered_again() -> None:
    hidden, weight = torch.ones(3, 4, 2), torch.eye(2)
    mask = torch.arange(4) < torch.tensor([[1], [4], [2]])
    with linear.skipping(mask, CPU):
        first = F.linear(hidden, weight)
        hidden *= 2
        second = F.linear(hidden, weight)
    assert torch.equal(second[mask], 2 * first[mask])


def test_embedding_without_gradients_skips_too(tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Encoder.from_pretrained(tiny_bert)
    with Products() as products:
        vectors = encoder.encode(runs.texts(12))
    monkeypatch.setattr(linear, "FULL", -1)
    torch.testing.assert_close(vectors, encoder.encode(runs.texts(12)))
    assert any(len(shape) == 1 for shape in products.rows)


@pytest.mark.parametrize("dropout", [False, True])
def test_layers_that_are_run_again_skip_the_same(dropout: bool, tiny_mpnet: Path) -> None:
    encoder = Encoder.from_pretrained(tiny_mpnet).train(dropout)
    tokens = of_lengths(encoder, [1, 9, 3, 2])
    vectors, gradients, _ = run(encoder, tokens)
    with execution.as_asked(encoder, TrainConfig(gradient_checkpointing=True, dropout=dropout)):
        again_vectors, again_gradients, _ = run(encoder, tokens)
    assert torch.equal(vectors, again_vectors)
    assert all(torch.equal(gradient, again_gradients[name]) for name, gradient in gradients.items())


def test_a_graph_that_is_dropped_is_freed_where_layers_are_run_again(tiny_mpnet: Path) -> None:
    encoder = Encoder.from_pretrained(tiny_mpnet)
    layers = encoder.backbone.model.encoder.layer  # type: ignore[union-attr]
    outputs = [weakref.ref(torch.empty(0))]
    layers[0].register_forward_hook(lambda _, __, output: outputs.append(weakref.ref(output[0])))
    layers[1].register_forward_hook(lambda *_: (_ for _ in ()).throw(MemoryError()))
    with execution.as_asked(encoder, TrainConfig(gradient_checkpointing=True)), pytest.raises(MemoryError):
        encoder(of_lengths(encoder, [1, 9, 3, 2]))
    gc.collect()
    assert [output() for output in outputs] == [None, None]


def test_sixteen_bits_stay_sixteen_bits(tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Encoder.from_pretrained(tiny_bert)
    encoder.compute_dtype = "bfloat16"
    tokens = of_lengths(encoder, [1, 9, 3, 2])
    skipped = encoder.compute(tokens)
    monkeypatch.setattr(linear, "FULL", -1)
    torch.testing.assert_close(skipped, encoder.compute(tokens), rtol=0, atol=2e-2)
