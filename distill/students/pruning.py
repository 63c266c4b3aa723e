"""A transformer student with fewer feed-forward neurons and attention heads in each layer."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor, nn

from distill.encoder import Encoder
from distill.errors import RecipeError
from distill.modules import Tokens, eval_mode
from distill.similarity import normalize, usable_rows
from distill.students.blocks import layer_list, rebuilt, transformer_of, with_model
from distill.students.summary import named
from distill.texts import Texts, texts_by_role

PROBES = 4  # random directions in which the movement of a vector is measured
_FEED_FORWARD = (  # what makes the neurons (how many stacked), and what reads them
    ({"intermediate.dense": 1}, "output.dense"),  # BERT, RoBERTa, MPNet, DeBERTa, ELECTRA
    ({"ffn.lin1": 1}, "ffn.lin2"),  # DistilBERT
    ({"mlp.Wi": 2}, "mlp.Wo"),  # ModernBERT: values, then gates
    ({"mlp.gate_proj": 1, "mlp.up_proj": 1}, "mlp.down_proj"),  # Qwen, Llama, Gemma, EuroBERT
    ({"layer.1.DenseReluDense.wi": 1}, "layer.1.DenseReluDense.wo"),  # T5
    ({"layer.1.DenseReluDense.wi_0": 1, "layer.1.DenseReluDense.wi_1": 1}, "layer.1.DenseReluDense.wo"),
)
_ATTENTION = (({"self_attn.q_proj": 1, "self_attn.k_proj": 1, "self_attn.v_proj": 1}, "self_attn.o_proj"),)


@dataclass(frozen=True)
class _Units:
    """Parts of a layer that can go one by one: `count` equal groups of the columns of `reader`, and the rows that make them."""

    count: int
    makers: Mapping[str, int]
    reader: str


def prune(
    student: Encoder,
    *,
    intermediate: int | None = None,
    heads: int | None = None,
    texts: Texts,
    vectors: Float[Tensor, "n e"] | None = None,
    seed: int = 0,
) -> Encoder:
    """A copy of a transformer student with `intermediate` feed-forward neurons and `heads` attention heads in each layer.

    What goes is what costs least in 1 - cosine to the teacher's `vectors` of `texts`, to second order: the slope when a
    part fades, plus half the squared movement of the student's own vector, in random directions (LeCun et al. 1990;
    Michel et al. 2019). Without `vectors` the movement alone counts. The mean of what goes is left in the bias.
    RecipeError for heads whose width the model's config cannot name (BERT, MPNet, RoBERTa: hidden_size /
    num_attention_heads). Cost: about six forward and backward passes over the texts, some hundred of which are enough.
    """
    model = transformer_of(student).model
    path, layers = layer_list(model, student.name)
    config, state = copy.deepcopy(model.config), dict(model.state_dict())
    if intermediate is None and heads is None:
        raise RecipeError("prune needs intermediate=... neurons, heads=..., or both.")
    with torch.no_grad(), eval_mode(student):
        if intermediate is not None:
            units = _feed_forward(model, layers[0], intermediate)
            kept = _most_important(student, layers, units, intermediate, texts, vectors, seed)
            _cut(state, path, units, *kept)
            setattr(config, _field(config), intermediate)
        if heads is not None:
            units, per_group = _attention(model, layers[0], heads)
            kept = _most_important(student, layers, units, heads // per_group, texts, vectors, seed)
            _cut(state, path, units, *kept)
            config.head_dim = _head_width(model.config)
            config.num_attention_heads, config.num_key_value_heads = heads, heads // per_group
    pruned = with_model(student, rebuilt(model, config, state, way_out="Prune `intermediate` alone."))
    sizes = [f"ff{intermediate}"] * (intermediate is not None) + [f"heads{heads}"] * (heads is not None)
    return named(pruned, "-".join(sizes), student)


def require_units(student: Encoder, intermediate: int | None, heads: int | None) -> None:
    """RecipeError for what `prune` cannot leave of a student. Costs nothing: no text is read."""
    model = transformer_of(student).model
    layer = layer_list(model, student.name)[1][0]
    if intermediate is not None:
        _feed_forward(model, layer, intermediate)
    if heads is not None:
        _attention(model, layer, heads)


def _feed_forward(model: Any, layer: nn.Module, wanted: int) -> _Units:
    names: dict[str, Any] = dict(layer.named_modules())
    found = [(makers, reader) for makers, reader in _FEED_FORWARD if {*makers, reader} <= set(names)]
    if not found:
        raise RecipeError(
            f"{type(model).__name__}: its feed-forward block is none that prune knows. Keep fewer layers."
        )
    makers, reader = found[0]
    _check_count(model, "feed-forward neurons", wanted, names[reader].in_features)
    return _Units(names[reader].in_features, makers, reader)


def _attention(model: Any, layer: nn.Module, wanted: int) -> tuple[_Units, int]:
    """The key-value heads of a layer, each with its query heads, and the number of these."""
    names, config = dict(layer.named_modules()), model.config
    found = [(makers, reader) for makers, reader in _ATTENTION if {*makers, reader} <= set(names)]
    if not found:
        raise RecipeError(
            f"{type(model).__name__}: the width of a head is hidden_size / num_attention_heads there, so that no config can "
            "name fewer heads of the same width. Prune `intermediate`, or keep fewer layers."
        )
    groups = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    per_group = config.num_attention_heads // groups
    _check_count(model, "attention heads", wanted, config.num_attention_heads)
    if wanted % per_group:
        raise RecipeError(f"heads go in groups of {per_group} that share a key and a value here, got heads={wanted}.")
    makers, reader = found[0]
    return _Units(groups, makers, reader), per_group


def _check_count(model: Any, what: str, wanted: int, there: int) -> None:
    if not 1 <= wanted <= there:
        raise RecipeError(f"{type(model).__name__} has {there} {what} in a layer; asked to keep {wanted}.")


def _field(config: Any) -> str:
    """The config's name for the number of feed-forward neurons."""
    return next(name for name in ("intermediate_size", "hidden_dim", "d_ff") if hasattr(config, name))


def _head_width(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _most_important(
    student: Encoder,
    layers: nn.ModuleList,
    units: _Units,
    wanted: int,
    texts: Texts,
    vectors: Float[Tensor, "n e"] | None,
    seed: int,
) -> tuple[Int[Tensor, "layers kept"], Float[Tensor, "layers columns"]]:
    """The numbers of the units to keep in each layer, rising, and the mean of each column that the reader reads."""
    readers: list[Any] = [layer.get_submodule(units.reader) for layer in layers]
    batches = list(_batches(student, texts, vectors))
    means = _means(student, readers, batches)
    costs = _costs(student, readers, means, units.count, batches, seed)
    return costs.topk(wanted, dim=1).indices.sort(dim=1).values, means


def _batches(
    student: Encoder, texts: Texts, vectors: Float[Tensor, "n e"] | None
) -> Iterator[tuple[Tokens, Tensor | None]]:
    """Texts of one length at a time, so that there is no padding to be averaged; with the teacher's unit vectors."""
    parts = [student.tokenize(some, prompt=student.prompt(role)).tokens for role, some in texts_by_role(texts)]
    tokens = Tokens(torch.cat([part.ids for part in parts]), torch.cat([part.lengths for part in parts]))
    if vectors is not None and vectors.shape != (len(tokens), student.width):
        raise RecipeError(
            f"{len(tokens)} texts and teacher vectors {tuple(vectors.shape)}; expected ({len(tokens)}, {student.width}), in the same order."
        )
    good = tokens.lengths > 0 if vectors is None else (tokens.lengths > 0) & usable_rows(vectors)
    if not good.any():
        raise RecipeError("prune measures on texts; got none that is usable. Give some hundred.")
    for length in tokens.lengths[good].unique():
        for rows in (good & (tokens.lengths == length)).nonzero().flatten().split(max(1, 1024 // int(length))):
            yield tokens.rows(rows), None if vectors is None else normalize(vectors[rows].to(student.device))


def _means(
    student: Encoder, readers: Sequence[Any], batches: Sequence[tuple[Tokens, Tensor | None]]
) -> Float[Tensor, "layers columns"]:
    """The mean over all tokens of what each reader reads; zero where there is no bias to leave it in."""
    sums = [torch.zeros(reader.in_features, device=student.device) for reader in readers]
    with ExitStack() as stack:
        for reader, total in zip(readers, sums, strict=True):
            if reader.bias is not None:
                stack.enter_context(_seen(reader, lambda x, total=total: total.add_(x.flatten(0, -2).float().sum(0))))
        for tokens, _ in batches:
            student(tokens)
    return torch.stack(sums) / sum(int(tokens.lengths.sum()) for tokens, _ in batches)


@torch.enable_grad()
def _costs(
    student: Encoder,
    readers: Sequence[Any],
    means: Float[Tensor, "layers columns"],
    count: int,
    batches: Sequence[tuple[Tokens, Tensor | None]],
    seed: int,
) -> Float[Tensor, "layers units"]:
    """What the loss of each unit costs, per text. The squared length of a derivative is that of its random projections.

    Each text has a direction of its own, so that the square of the batch's derivative is, in the mean, the sum of the
    texts' squares: no text's derivative is ever alone.
    """
    gates = [torch.ones(count, device=student.device, requires_grad=True) for _ in readers]
    generator = torch.Generator().manual_seed(seed)
    slope, movement = torch.zeros(len(readers), count), torch.zeros(len(readers), count)
    with ExitStack() as stack:
        for reader, gate, mean in zip(readers, gates, means, strict=True):
            stack.enter_context(_gated(reader, gate, mean))
        for tokens, targets in batches:
            own = normalize(student(tokens))
            for _ in range(PROBES):
                probe = torch.randn(own.shape, generator=generator).to(own.device)
                movement += _derivatives(own, probe, gates).square() / PROBES
            if targets is not None:
                slope += _derivatives(own, targets, gates)
    return (slope + movement / 2) / sum(len(tokens) for tokens, _ in batches)


def _derivatives(own: Tensor, directions: Tensor, gates: Sequence[Tensor]) -> Float[Tensor, "layers units"]:
    return torch.stack(torch.autograd.grad((own * directions).sum(), gates, retain_graph=True)).cpu()


@contextmanager
def _gated(reader: nn.Module, gate: Tensor, mean: Tensor) -> Iterator[None]:
    """What a layer reads, faded towards its mean: all of it at gate 1, the mean at 0."""
    wide = repeat(gate, "u -> (u r)", r=len(mean) // len(gate))
    hook = reader.register_forward_pre_hook(lambda _, args: (mean + (args[0] - mean) * wide, *args[1:]))
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def _seen(reader: nn.Module, look: Any) -> Iterator[None]:
    def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
        look(args[0])

    handle = reader.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _cut(
    state: dict[str, Tensor],
    path: str,
    units: _Units,
    kept: Int[Tensor, "layers kept"],
    means: Float[Tensor, "layers columns"],
) -> None:
    """Leave the units `kept` in a state dict, and the mean of the others in the bias of their reader."""
    for number, (places, mean) in enumerate(zip(kept, means, strict=True)):
        for name, stacked in units.makers.items():
            for key in (f"{path}.{number}.{name}.weight", f"{path}.{number}.{name}.bias"):
                if key in state:
                    rows = rearrange(torch.arange(len(state[key])), "(s u r) -> s u r", s=stacked, u=units.count)
                    state[key] = state[key][rows[:, places].flatten().to(state[key].device)]
        key = f"{path}.{number}.{units.reader}"
        weight = state[f"{key}.weight"]
        columns = rearrange(torch.arange(weight.shape[1]), "(u r) -> u r", u=units.count)[places].flatten()
        columns = columns.to(weight.device)
        if f"{key}.bias" in state:
            lost = mean.index_fill(0, columns, 0.0)
            state[f"{key}.bias"] = state[f"{key}.bias"] + weight @ lost
        state[f"{key}.weight"] = weight[:, columns]
