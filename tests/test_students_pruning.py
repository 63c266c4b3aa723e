"""What is pruned costs least, the rest is the same model, and its folder opens anywhere."""

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from test_students import TEXTS, gap, is_the_same_model_when_saved, phrases
from test_students_layers import gpt2, modernbert

from distill import students
from distill.encoder import Encoder
from distill.errors import RecipeError
from distill.similarity import pairwise_cosine

NEURONS = 2 * tiny.WIDTH


def readers(student: Encoder, name: str) -> list[torch.nn.Linear]:
    return [module for path, module in student.backbone.model.named_modules() if path.endswith(name)]


@torch.no_grad()
def deafen(student: Encoder, name: str, units: torch.Tensor, size: int = 1) -> None:
    """Let a linear layer of every block read nothing of some units."""
    for reader in readers(student, name):
        for unit in units.tolist():
            reader.weight[:, unit * size : (unit + 1) * size] = 0


@pytest.mark.parametrize(
    ("kind", "reader"),
    [
        ("bert", "output.dense"),
        ("mpnet", "output.dense"),
        ("distilbert", "ffn.lin2"),
        ("qwen", "mlp.down_proj"),
        ("modernbert", "mlp.Wo"),
    ],
)
def test_neurons_that_nobody_reads_go_first_and_change_nothing(
    tiny_model: Callable[..., Path], tmp_path: Path, kind: str, reader: str
) -> None:
    student = modernbert() if kind == "modernbert" else Encoder.from_pretrained(tiny_model(kind))
    unread = torch.randperm(NEURONS)[: NEURONS // 2]
    for module in readers(student, reader):
        if module.in_features == NEURONS:
            with torch.no_grad():
                module.weight[:, unread] = 0
    before = student.fingerprint()
    pruned = students.prune(student, intermediate=NEURONS // 2, texts=phrases(24))
    assert pruned.parameter_count < student.parameter_count
    assert gap(pruned.encode(TEXTS), student.encode(TEXTS)) <= 1e-5
    is_the_same_model_when_saved(pruned, tmp_path / "pruned")
    assert student.fingerprint() == before
    fewer = students.prune(student, intermediate=NEURONS // 4, texts=phrases(24))
    assert gap(fewer.encode(TEXTS), student.encode(TEXTS)) > 1e-3, "those that are read do change it"


def test_a_neuron_that_never_changes_stays_in_the_bias(tiny_bert: Path) -> None:
    student = Encoder.from_pretrained(tiny_bert)
    constant = torch.randperm(NEURONS)[: NEURONS // 2]
    with torch.no_grad():
        for layer in student.backbone.model.encoder.layer:
            layer.intermediate.dense.weight[constant] = 0
            layer.intermediate.dense.bias[constant] = 2.0
    pruned = students.prune(student, intermediate=NEURONS // 2, texts=phrases(24))
    assert gap(pruned.encode(TEXTS), student.encode(TEXTS)) <= 1e-5


def test_heads_go_where_the_config_can_say_so(tiny_qwen: Path, tmp_path: Path) -> None:
    """Four query heads of width 8 share two keys and values; the second pair is read by nobody."""
    student = Encoder.from_pretrained(tiny_qwen)
    deafen(student, "self_attn.o_proj", torch.tensor([1]), size=16)
    pruned = students.prune(student, heads=2, texts=phrases(24))
    config = pruned.backbone.model.config
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (2, 1, 8)
    assert gap(pruned.encode(TEXTS), student.encode(TEXTS)) <= 1e-5
    is_the_same_model_when_saved(pruned, tmp_path / "pruned")
    both = students.prune(student, heads=2, intermediate=16, texts=phrases(24))
    assert both.name == "qwen-ff16-heads2"
    is_the_same_model_when_saved(both, tmp_path / "both")


def worst_cosine(student: Encoder, intermediate: int, texts: list[str], vectors: torch.Tensor | None) -> float:
    pruned = students.prune(student, intermediate=intermediate, texts=texts, vectors=vectors)
    return float(pairwise_cosine(pruned.encode(texts), student.encode(texts)).mean())


def test_what_goes_costs_less_than_what_would_go_at_random(tiny_bert: Path) -> None:
    student, texts = Encoder.from_pretrained(tiny_bert), phrases(64)
    chosen = worst_cosine(student, NEURONS - 16, texts, None)
    by_chance = []
    for seed in range(4):
        other = Encoder.from_pretrained(tiny_bert)
        generator = torch.Generator().manual_seed(seed)
        for layer in other.backbone.model.encoder.layer:
            with torch.no_grad():
                layer.output.dense.weight[:, torch.randperm(NEURONS, generator=generator)[:16]] = 0
        by_chance.append(float(pairwise_cosine(other.encode(texts), student.encode(texts)).mean()))
    assert chosen > max(by_chance)


def test_with_the_teachers_vectors_a_neuron_that_harms_goes(tiny_bert: Path) -> None:
    """The teacher has no neuron 5; the student's reads aloud. Only the teacher's vectors can say that it should not."""
    teacher, student, texts = Encoder.from_pretrained(tiny_bert), Encoder.from_pretrained(tiny_bert), phrases(64)
    with torch.no_grad():
        for encoder, size in ((teacher, 0.0), (student, 0.3)):
            encoder.backbone.model.encoder.layer[-1].output.dense.weight[:, 5] *= size
    vectors = teacher.encode(texts)
    before = float(pairwise_cosine(student.encode(texts), vectors).mean())
    pruned = students.prune(student, intermediate=NEURONS - 1, texts=texts, vectors=vectors)
    rows = [layer.intermediate.dense.weight for layer in pruned.backbone.model.encoder.layer]
    there = student.backbone.model.encoder.layer[-1].intermediate.dense.weight[5]
    assert not (rows[-1] == there).all(dim=1).any()
    assert before < 1


def test_pruning_repeats_and_leaves_no_hook(tiny_bert: Path) -> None:
    student, texts = Encoder.from_pretrained(tiny_bert).train(), phrases(24)
    student.backbone.model.embeddings.eval()
    modes = [module.training for module in student.modules()]
    one, two = (students.prune(student, intermediate=8, texts=texts) for _ in range(2))
    assert one.fingerprint() == two.fingerprint()
    assert [module.training for module in student.modules()] == modes
    assert not one.training
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in student.modules())


def test_what_cannot_be_pruned_is_refused(tiny_bert: Path, tiny_qwen: Path) -> None:
    bert, qwen = Encoder.from_pretrained(tiny_bert), Encoder.from_pretrained(tiny_qwen)
    with pytest.raises(RecipeError, match=r"BertModel: the width of a head is hidden_size / num_attention_heads"):
        students.prune(bert, heads=2, texts=TEXTS)
    with pytest.raises(RecipeError, match="heads go in groups of 2"):
        students.prune(qwen, heads=3, texts=TEXTS)
    for count in (0, 65):
        with pytest.raises(
            RecipeError, match=f"BertModel has 64 feed-forward neurons in a layer; asked to keep {count}"
        ):
            students.prune(bert, intermediate=count, texts=TEXTS)
    with pytest.raises(RecipeError, match="prune needs intermediate"):
        students.prune(bert, texts=TEXTS)
    with pytest.raises(RecipeError, match="feed-forward block is none that prune knows"):
        students.prune(gpt2(False), intermediate=4, texts=TEXTS)
    with pytest.raises(RecipeError, match=r"14 texts and teacher vectors \(2, 32\)"):
        students.prune(bert, intermediate=4, texts=TEXTS, vectors=torch.ones(2, 32))
    with pytest.raises(RecipeError, match="static table"):
        students.prune(students.static(bert, width=4), intermediate=4, texts=TEXTS)
