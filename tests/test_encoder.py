"""An encoder gives the vectors that sentence-transformers gives, from its folders and into its folders."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoTokenizer

from distill import packages
from distill.embed import embed, embed_vocabulary, import_vectors
from distill.encoder import Encoder
from distill.errors import DataError, IntegrityError, RecipeError, ResourceError
from distill.evaluation import EvaluationData, evaluate
from distill.folder import UNLIMITED
from distill.modules import Dense, Normalize, Pooling, StaticTable, Tokens, TransformerBackbone

LONG = " ".join(tiny.SENTENCES * 3)
TEXTS = [*tiny.SENTENCES, "a", "", "Ünïcödé ὀΣΣ 漢字", " spaces  and\ttabs\n", LONG, "[SEP] [MASK] </s>"]
PROMPTS = {"query": "Find: ", "document": "", "topic": "About: "}
MODES = ["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]
IDENTITY = tiny.dense(tiny.WIDTH, 24, "Identity")
MODELS: list[tuple[str, dict[str, Any]]] = [
    ("bert", {}),
    ("bert_cls_dense", {}),
    ("mpnet", {}),
    ("distilbert", {}),
    ("albert", {}),
    ("qwen", {}),
    ("qwen", {"padding_side": "left"}),
    ("qwen", {"pooling": ["weightedmean"], "head": [], "old_style": False}),
    *(("bert", {"layers": 2, "pooling": [mode], "head": []}) for mode in MODES),
    ("bert", {"layers": 2, "pooling": ["cls", "max", "mean"]}),
    ("bert", {"layers": 2, "pooling": ["weightedmean", "mean"], "old_style": False}),
    ("bert", {"layers": 2, "head": [IDENTITY]}),
    ("bert", {"layers": 2, "head": [tiny.dense(tiny.WIDTH, 48, "GELU"), tiny.dense(48, 16), "Normalize"]}),
    ("bert", {"layers": 2, "prompts": PROMPTS, "default_prompt_name": "topic"}),
    ("bert", {"layers": 2, "lowercase": False, "do_lower_case": True, "max_length": 20}),
    ("bert", {"layers": 2, "max_length": None}),
]
STATIC = ("static", {})
TOLERANCE = 1e-5


def name(model: tuple[str, dict[str, Any]]) -> str:
    shown = {key: len(value) if key == "head" else value for key, value in model[1].items()}
    return model[0] + "".join(f"-{key}={value}" for key, value in shown.items()).replace(" ", "")


each_model = pytest.mark.parametrize("model", MODELS, ids=name)
each_model_and_static = pytest.mark.parametrize("model", [*MODELS, STATIC], ids=name)


@pytest.fixture
def folder_of(tiny_model: Callable[..., Path], static_folder: Path) -> Callable[..., Path]:
    return lambda model: static_folder if model is STATIC else tiny_model(model[0], **model[1])


@pytest.fixture(scope="session")
def static_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "static"
    static_encoder().save_pretrained(path)
    return path


def static_encoder() -> Encoder:
    tokenizer = tiny.wordpiece().backend_tokenizer
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(tokenizer.get_vocab_size(), 8, generator=generator)
    weights = torch.rand(len(table), generator=generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return Encoder(StaticTable(table, weights), tokenizer, head=[Dense(8, 12), Normalize()]).eval()


@pytest.fixture
def bert(tiny_bert: Path) -> Encoder:
    return Encoder.from_pretrained(tiny_bert)


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Path], Path]:
    """A copy that a test may spoil."""
    return lambda folder: Path(shutil.copytree(folder, tmp_path / "copy"))


def theirs(folder: Path) -> Any:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu", local_files_only=True)


def readable(folder: Path) -> list[str]:
    """All texts; of none at all, a tokenizer without special tokens leaves nothing that a transformer could run on."""
    return [text for text in TEXTS if text or "qwen" not in folder.name]


def gap(one: torch.Tensor, two: torch.Tensor) -> float:
    assert one.shape == two.shape
    return float((one - two).abs().max())


# Equal to sentence-transformers


@each_model_and_static
def test_vectors_equal_sentence_transformers(folder_of: Callable[..., Path], model: Any) -> None:
    folder = folder_of(model)
    ours, reference, texts = Encoder.from_pretrained(folder), theirs(folder), readable(folder)
    assert gap(ours.encode(texts), reference.encode(texts, convert_to_tensor=True)) <= TOLERANCE
    for role in ("query", "document"):
        expected = getattr(reference, f"encode_{role}")(texts, convert_to_tensor=True)
        assert gap(ours.encode(texts, role=role), expected) <= TOLERANCE


def test_the_texts_would_show_a_wrong_pooling(tiny_model: Callable[..., Path]) -> None:
    vectors = [
        Encoder.from_pretrained(tiny_model("bert", layers=2, pooling=[mode], head=[])).encode(TEXTS) for mode in MODES
    ]
    for number, one in enumerate(vectors):
        assert all(gap(one, two) > 0.02 for two in vectors[:number])


@pytest.mark.parametrize("model", sorted(packages.PACKAGES))
def test_the_real_teachers(model: str) -> None:
    if not packages.is_installed(model):
        pytest.skip(f"the weights are not installed: {packages.PACKAGES[model].install}")
    ours = Encoder.from_pretrained(model)
    reference = theirs(packages.package_folder(model, root=Path("~/.cache/distill").expanduser()))
    texts = [*tiny.SENTENCES[:4], "", LONG]
    assert gap(ours.encode(texts), reference.encode(texts, convert_to_tensor=True)) <= TOLERANCE


def test_a_bare_transformer_is_pooled_by_the_mean(copy_of: Callable[..., Path], tiny_bert: Path) -> None:
    folder = bare(copy_of(tiny_bert))
    ours = Encoder.from_pretrained(folder)
    assert (ours.width, len(ours.head), ours.max_length) == (tiny.WIDTH, 0, tiny.MAX_LENGTH)
    assert gap(ours.encode(TEXTS), theirs(folder).encode(TEXTS, convert_to_tensor=True)) <= TOLERANCE


def bare(folder: Path) -> Path:
    for path in ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"):
        (folder / path).unlink(missing_ok=True)
    return folder


@pytest.mark.parametrize("change", [{}, {"is_causal": False}], ids=str)
def test_a_bare_causal_language_model_is_pooled_as_sentence_transformers_does(
    copy_of: Callable[..., Path], tiny_qwen: Path, change: dict[str, Any]
) -> None:
    folder = bare(copy_of(tiny_qwen))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["Qwen2ForCausalLM"], **change}))
    ours, texts = Encoder.from_pretrained(folder), readable(folder)
    assert list(ours.backbone.pooling.modes) == (["mean"] if change else ["lasttoken"])
    assert gap(ours.encode(texts), theirs(folder).encode(texts, convert_to_tensor=True)) <= TOLERANCE


@pytest.mark.parametrize("kind", ["mpnet", "roberta"])
def test_positions_that_begin_behind_the_padding_do_not_run_out(
    kind: str, copy_of: Callable[..., Path], tiny_model: Callable[..., Path]
) -> None:
    folder = copy_of(tiny_model(kind, layers=2))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("model_max_length", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    for asked in (None, tiny.MAX_LENGTH + 2, 5):
        if asked is None:
            (folder / "sentence_bert_config.json").unlink()
        else:
            (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": asked}))
        encoder = Encoder.from_pretrained(folder)
        usable = tiny.MAX_LENGTH + 2 - (encoder.backbone.model.embeddings.position_embeddings.padding_idx + 1)
        assert encoder.max_length == (5 if asked == 5 else usable)
        assert encoder.encode([3 * LONG]).isfinite().all()


def test_a_padding_that_the_table_does_not_have_is_another_one(copy_of: Callable[..., Path], tiny_bert: Path) -> None:
    folder = copy_of(tiny_bert)
    expected = Encoder.from_pretrained(folder).encode(TEXTS)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "[NEW]"})
    tokenizer.save_pretrained(folder)
    encoder = Encoder.from_pretrained(folder)
    assert encoder.tokenizer.pad_token_id == encoder.backbone.model.config.vocab_size
    assert gap(encoder.encode(TEXTS), expected) <= TOLERANCE


def test_settings_are_found_under_their_older_names(copy_of: Callable[..., Path], tiny_bert: Path) -> None:
    folder = copy_of(tiny_bert)
    (folder / "sentence_bert_config.json").unlink()
    (folder / "sentence_roberta_config.json").write_text(json.dumps({"max_seq_length": 7}))
    assert Encoder.from_pretrained(folder).max_length == theirs(folder).max_seq_length == 7


AS_TEXT = {"method": "forward", "method_output_name": "last_hidden_state"}


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"modality_config": {"text": AS_TEXT}, "module_output_name": "token_embeddings"}, None),
        ({"model_args": {"dtype": "bfloat16"}, "tokenizer_args": {"padding_side": "left"}, "query_length": None}, None),
        ({"modality_config": {"text": AS_TEXT, "message": AS_TEXT}}, "modality_config"),
        ({"modality_config": {"text": AS_TEXT | {"method_output_name": "logits"}}}, "modality_config"),
        ({"query_length": 32, "document_length": 256}, "query_length, document_length"),
        ({"transformer_task": "fill-mask"}, "transformer_task"),
        ({"config_args": {"is_causal": False}}, "config_args.is_causal"),
        ({"processing_kwargs": {"text": {"add_special_tokens": False}}}, "processing_kwargs.text"),
    ],
    ids=str,
)
def test_settings_that_change_how_texts_are_read_are_refused(
    copy_of: Callable[..., Path], tiny_bert: Path, settings: dict[str, Any], named: str | None
) -> None:
    folder = copy_of(tiny_bert)
    path = folder / "sentence_bert_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    if named is None:
        Encoder.from_pretrained(folder)
    else:
        with pytest.raises(RecipeError, match=f"sentence_bert_config.json sets {named}, which changes how texts"):
            Encoder.from_pretrained(folder)


def test_which_end_of_a_text_is_cut_is_in_the_fingerprint(copy_of: Callable[..., Path], tiny_bert: Path) -> None:
    folder = copy_of(tiny_bert)
    before = Encoder.from_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"truncation_side": "left"}))
    after = Encoder.from_pretrained(folder)
    assert gap(after.encode([LONG]), before.encode([LONG])) > 1e-3
    assert after.fingerprint() == before.fingerprint() | {"truncation_side": "left"}


def test_prompts_are_chosen_as_sentence_transformers_chooses(tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model("bert", layers=2, prompts=PROMPTS, default_prompt_name="topic")
    encoder = Encoder.from_pretrained(folder)
    roles = ("query", "document", "topic", "other", None)
    assert [encoder.prompt(role) for role in roles] == ["Find: ", "", "About: ", "About: ", "About: "]
    assert gap(encoder.encode(["x"], role="query"), encoder.encode(["x"])) > 1e-3
    assert Encoder.from_pretrained(tiny_model("bert")).prompt("query") == ""
    undefaulted = Encoder.from_pretrained(tiny_model("bert", layers=2, prompts={"query": "q "}))
    assert [undefaulted.prompt(role) for role in roles] == ["q ", "", "", "", ""]
    with pytest.raises(RecipeError, match=r"the default prompt is 'quary'.*query"):
        Encoder(encoder.backbone, encoder.tokenizer, prompts=PROMPTS, default_prompt_name="quary")


# Written and read again


@each_model_and_static
def test_saving_and_reading_changes_nothing(folder_of: Callable[..., Path], model: Any, tmp_path: Path) -> None:
    folder = folder_of(model)
    encoder, texts = Encoder.from_pretrained(folder), readable(folder)
    encoder.save_pretrained(tmp_path / "ours")
    again = Encoder.from_pretrained(tmp_path / "ours")
    assert again.fingerprint() == encoder.fingerprint()
    assert torch.equal(again.encode(texts, role="query"), encoder.encode(texts, role="query"))
    expected = theirs(tmp_path / "ours").encode_query(texts, convert_to_tensor=True)
    assert gap(again.encode(texts, role="query"), expected) <= TOLERANCE
    types = [module["type"] for module in json.loads((tmp_path / "ours" / "modules.json").read_text())]
    assert all(kind.rpartition(".")[0] == "sentence_transformers.models" for kind in types), "5.4 reads no other path"


@each_model_and_static
def test_what_sentence_transformers_saved_is_read(folder_of: Callable[..., Path], model: Any, tmp_path: Path) -> None:
    folder = folder_of(model)
    encoder, reference, texts = Encoder.from_pretrained(folder), theirs(folder), readable(folder)
    reference.save(str(tmp_path / "theirs"))
    again = Encoder.from_pretrained(tmp_path / "theirs")
    before, after = encoder.fingerprint(), again.fingerprint()
    if encoder.lowercase:  # sentence-transformers 6 puts the lower case into the tokenizer, and drops the flag
        before |= {field: after[field] for field in ("tokenizer", "lowercase")}
    assert after == before
    assert gap(again.encode(texts), encoder.encode(texts)) <= TOLERANCE


def test_a_static_table_keeps_its_vectors_when_its_weights_are_folded_in(tmp_path: Path) -> None:
    encoder = static_encoder()
    encoder.save_pretrained(tmp_path / "static")
    again = Encoder.from_pretrained(tmp_path / "static")
    assert gap(again.encode(TEXTS), encoder.encode(TEXTS)) <= 1e-6
    assert again.fingerprint() == encoder.fingerprint()
    assert set(load_file(tmp_path / "static" / "model.safetensors")) == {"embedding.weight"}
    encoder.max_length = 4
    encoder.save_pretrained(tmp_path / "static")
    short = Encoder.from_pretrained(tmp_path / "static")
    assert short.max_length == 4
    assert gap(short.encode(TEXTS), theirs(tmp_path / "static").encode(TEXTS, convert_to_tensor=True)) <= TOLERANCE


def test_concatenated_poolings_keep_their_order(bert: Encoder, tmp_path: Path) -> None:
    pooling = Pooling(tiny.WIDTH, ["mean", "cls"])  # the booleans of older folders would mean cls, mean
    encoder = Encoder(TransformerBackbone(bert.backbone.model, pooling, pad_id=0), bert.tokenizer, max_length=64)
    encoder.save_pretrained(tmp_path / "model")
    assert gap(Encoder.from_pretrained(tmp_path / "model").encode(TEXTS), encoder.encode(TEXTS)) <= 1e-6
    assert gap(theirs(tmp_path / "model").encode(TEXTS, convert_to_tensor=True), encoder.encode(TEXTS)) <= TOLERANCE


class Shout(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


@pytest.mark.parametrize(
    "layer",
    [nn.Linear(32, 32), nn.LayerNorm(32), Dense(32, 8, activation=Shout()), Dense(32, 8, activation=nn.LeakyReLU(0.3))],
    ids=["Linear", "LayerNorm", "own code", "options"],
)
def test_a_layer_that_a_folder_cannot_hold_is_not_saved(bert: Encoder, tmp_path: Path, layer: nn.Module) -> None:
    bert.head = nn.Sequential(layer)
    with pytest.raises(RecipeError, match="Dense"):
        bert.save_pretrained(tmp_path / "model")
    assert not [*tmp_path.iterdir()]


@each_model_and_static
@pytest.mark.parametrize("cut", [8, 10_000])
def test_vectors_are_cut_as_sentence_transformers_cuts_them(
    folder_of: Callable[..., Path], copy_of: Callable[..., Path], model: Any, cut: int, tmp_path: Path
) -> None:
    folder = copy_of(folder_of(model))
    whole, texts = Encoder.from_pretrained(folder), readable(folder)
    rewrite(folder / "config_sentence_transformers.json", lambda config: config.update(truncate_dim=cut))
    ours = Encoder.from_pretrained(folder)
    assert gap(ours.encode(texts), theirs(folder).encode(texts, convert_to_tensor=True)) <= TOLERANCE
    assert gap(ours.encode(texts), whole.encode(texts)[:, :cut]) == 0  # not brought to length 1 again
    assert ours.width == min(cut, whole.width)
    assert ours.fingerprint()["modules"] != whole.fingerprint()["modules"]
    ours.save_pretrained(tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "config_sentence_transformers.json").read_text())["truncate_dim"] == cut
    assert Encoder.from_pretrained(tmp_path / "ours").fingerprint() == ours.fingerprint()


# Folders that are refused


def rewrite(path: Path, change: Callable[[Any], Any]) -> None:
    value = json.loads(path.read_text())
    changed = change(value)
    tiny.write_json(path, value if changed is None else changed)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("sentence_transformers.models.LSTM", "sentence_transformers.models.LSTM"),
        ("custom_st.Transformer", "custom_st.Transformer.*[Rr]emote code"),
        ("os.system", "os.system"),
        ("", "''"),
    ],
)
def test_unknown_modules_are_refused(copy_of: Callable[..., Path], tiny_bert: Path, kind: str, message: str) -> None:
    folder = copy_of(tiny_bert)
    rewrite(folder / "modules.json", lambda modules: modules[2].update(type=kind))
    with pytest.raises(RecipeError, match=message):
        Encoder.from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda modules: [modules[0], modules[2], modules[1]], RecipeError, "Transformer > Normalize > Pooling"),
        (lambda modules: [*modules, modules[1]], RecipeError, "Normalize > Pooling"),
        (lambda modules: modules[1:], RecipeError, "Pooling > Normalize"),
        (lambda modules: [modules[0], modules[2]], RecipeError, "Transformer > Normalize"),
        (lambda modules: [], IntegrityError, "names no module"),
        (lambda modules: {"0": modules}, IntegrityError, "holds a dict, expected a list"),
        (lambda modules: ["Transformer"], IntegrityError, "a module has a path and a type, got 'Transformer'"),
        (lambda modules: [modules[0] | {"path": None}], IntegrityError, "a module has a path"),
        (lambda modules: [modules[0] | {"path": "../secret"}], RecipeError, "outside the folder, to '../secret'"),
        (lambda modules: [modules[0] | {"path": "/etc"}], RecipeError, "outside the folder, to '/etc'"),
    ],
)
def test_modules_in_another_order_or_shape_are_refused(
    copy_of: Callable[..., Path], tiny_bert: Path, change: Callable[[Any], Any], error: type[Exception], message: str
) -> None:
    folder = copy_of(tiny_bert)
    rewrite(folder / "modules.json", change)
    with pytest.raises(error, match=message):
        Encoder.from_pretrained(folder)


@pytest.mark.parametrize(
    "activation",
    [
        "os.system",
        "torch.load",
        "torch.nn.Linear",
        "torch.nn.modules.os.system",
        "torch.nn.Module.x",
        "builtins.eval",
        "",
    ],
)
def test_foreign_activations_are_refused(copy_of: Callable[..., Path], tiny_bert_cls: Path, activation: str) -> None:
    folder = copy_of(tiny_bert_cls)
    rewrite(folder / "2_Dense" / "config.json", lambda config: config.update(activation_function=activation))
    with pytest.raises(RecipeError, match=f"activation '{activation}'"):
        Encoder.from_pretrained(folder)


@pytest.mark.parametrize(
    ("path", "change", "message"),
    [
        ("2_Dense/config.json", {"use_residual": True}, "use_residual"),
        ("2_Dense/config.json", {"module_input_name": "token_embeddings"}, "module_input_name=token_embeddings"),
        ("1_Pooling/config.json", {"pooling_mode": "median"}, "pooling modes are .*median"),
        ("config_sentence_transformers.json", {"truncate_dim": 0}, "truncate_dim is 1 or more"),
        ("config_sentence_transformers.json", {"truncate_dim": "8"}, "truncate_dim is 1 or more"),
        ("config_sentence_transformers.json", {"default_prompt_name": "quary"}, "default prompt is 'quary'"),
        ("config.json", {"model_type": "martian"}, "transformers cannot open"),
    ],
)
def test_settings_that_would_change_vectors_are_refused(
    copy_of: Callable[..., Path], tiny_bert_cls: Path, unchecked: None, path: str, change: dict[str, Any], message: str
) -> None:
    folder = copy_of(tiny_bert_cls)
    rewrite(folder / path, lambda config: config.update(change))
    with pytest.raises((RecipeError, IntegrityError), match=message):
        Encoder.from_pretrained(folder)


def test_code_in_a_folder_is_never_run(copy_of: Callable[..., Path], tiny_bert: Path, tmp_path: Path) -> None:
    folder = copy_of(tiny_bert)
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Model: pass\nclass Config: pass\n")
    foreign = {"model_type": "martian", "auto_map": {"AutoModel": "code.Model", "AutoConfig": "code.Config"}}
    rewrite(folder / "config.json", lambda config: config.update(foreign))
    with pytest.raises(RecipeError, match="transformers cannot open"):
        Encoder.from_pretrained(folder)
    assert not (tmp_path / "ran").exists()


def test_a_model_with_two_halves_is_refused(tmp_path: Path) -> None:
    from transformers import BartConfig, BartModel

    tokenizer = tiny.wordpiece()
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = BartConfig(vocab_size=len(tokenizer), **sizes, **heads)
    with pytest.raises(RecipeError, match="holds a BartModel; expected an encoder"):
        Encoder.from_pretrained(tiny.save(tmp_path / "bart", BartModel(config), tokenizer))


@pytest.mark.parametrize("kind", ["T5", "MT5", "UMT5"])
@pytest.mark.parametrize("whole", [True, False], ids=["with a decoder", "encoder alone"])
def test_the_encoder_of_a_t5_folder_is_the_one_that_sentence_transformers_runs(
    tmp_path: Path, kind: str, whole: bool
) -> None:
    """As sentence-t5: encoder, mean, Dense without bias and activation, Normalize; written by sentence-transformers itself."""
    import transformers
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Dense, Normalize, Pooling, Transformer

    folder, written = tiny.t5(tmp_path / "bare", kind=kind, whole=whole), tmp_path / "written"
    layers = [Transformer(str(folder), max_seq_length=20), Pooling(tiny.WIDTH)]
    layers += [Dense(tiny.WIDTH, 24, bias=False, activation_function=torch.nn.Identity()), Normalize()]
    original = SentenceTransformer(modules=layers, device="cpu")
    original.save(str(written))
    ours = Encoder.from_pretrained(written)
    assert type(ours.backbone.model) is getattr(transformers, f"{kind}EncoderModel")
    assert (ours.width, ours.max_length) == (24, 20)
    assert gap(ours.encode(TEXTS), original.encode(TEXTS, convert_to_tensor=True)) <= TOLERANCE
    ours.save_pretrained(tmp_path / "again")
    again = Encoder.from_pretrained(tmp_path / "again")
    assert again.fingerprint() == ours.fingerprint()
    reread = theirs(tmp_path / "again").encode(TEXTS, convert_to_tensor=True)
    assert gap(reread, ours.encode(TEXTS)) <= TOLERANCE


def test_a_prompt_left_out_of_the_pooling_is_refused(copy_of: Callable[..., Path], tiny_model: Any) -> None:
    folder = copy_of(tiny_model("bert", layers=2, prompts=PROMPTS))
    rewrite(folder / "1_Pooling" / "config.json", lambda config: config.update(include_prompt=False))
    with pytest.raises(RecipeError, match="include_prompt"):
        Encoder.from_pretrained(folder)


def test_pickles_are_refused_by_name(copy_of: Callable[..., Path], tiny_bert_cls: Path) -> None:
    folder = copy_of(tiny_bert_cls)
    weights = load_file(folder / "2_Dense" / "model.safetensors")
    (folder / "2_Dense" / "model.safetensors").unlink()
    torch.save(weights, folder / "2_Dense" / "pytorch_model.bin")
    with pytest.raises(ResourceError, match=r"2_Dense/pytorch_model\.bin, a pickle"):
        Encoder.from_pretrained(folder)


@pytest.mark.parametrize("path", ["model.safetensors", "2_Dense/model.safetensors", "config.json", "modules.json"])
def test_a_file_that_is_missing_or_cut_is_named(copy_of: Callable[..., Path], tiny_bert_cls: Path, path: str) -> None:
    folder = copy_of(tiny_bert_cls)
    content = (folder / path).read_bytes()
    (folder / path).write_bytes(content[: len(content) // 2])
    with pytest.raises(IntegrityError, match="copy"):
        Encoder.from_pretrained(folder)
    (folder / path).unlink()
    if path != "modules.json":  # without it, the folder is a bare transformer
        with pytest.raises(IntegrityError, match="copy"):
            Encoder.from_pretrained(folder)


def test_weights_drawn_at_random_are_refused(copy_of: Callable[..., Path], tiny_bert: Path) -> None:
    folder = copy_of(tiny_bert)
    rewrite(folder / "config.json", lambda config: config.update(num_hidden_layers=tiny.LAYERS + 1))
    with pytest.raises(IntegrityError, match=r"16 weights that config\.json asks for are not in the file"):
        Encoder.from_pretrained(folder)


def test_a_missing_pooler_is_not_drawn_at_random(copy_of: Callable[..., Path], tiny_bert: Path) -> None:
    folder = copy_of(tiny_bert)
    weights = load_file(folder / "model.safetensors")
    save_file(
        {key: value for key, value in weights.items() if "pooler" not in key},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    first, second = Encoder.from_pretrained(folder), Encoder.from_pretrained(folder)
    assert first.fingerprint() == second.fingerprint()
    assert torch.equal(first.encode(TEXTS), Encoder.from_pretrained(tiny_bert).encode(TEXTS))


def test_a_table_smaller_than_its_vocabulary_is_refused(copy_of: Callable[..., Path], static_folder: Path) -> None:
    folder = copy_of(static_folder)
    save_file({"embedding.weight": torch.ones(5, 8)}, folder / "model.safetensors")
    with pytest.raises(IntegrityError, match="5 token vectors"):
        Encoder.from_pretrained(folder)
    save_file({"other": torch.ones(5, 8)}, folder / "model.safetensors")
    with pytest.raises(IntegrityError, match=r"no embedding\.weight; it holds other"):
        Encoder.from_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(IntegrityError, match=r"tokenizer\.json cannot be read"):
        Encoder.from_pretrained(folder)


def test_what_is_no_encoder_is_refused_with_the_way_to_one(bert: Encoder, tiny_bert: Path, unchecked: None) -> None:
    data = EvaluationData(texts=TEXTS)
    for call in (
        lambda model: embed(TEXTS, model),
        lambda model: embed_vocabulary(model),
        lambda model: import_vectors(TEXTS, torch.ones(len(TEXTS), 8).numpy(), model, "store"),
        lambda model: evaluate({"student": model}, bert, data),
        lambda model: evaluate({"student": bert}, model, data),
    ):
        with pytest.raises(
            TypeError, match=r"sentence_transformers.*SentenceTransformer\. Save it.*save_pretrained\(path\)"
        ):
            call(theirs(tiny_bert))
        with pytest.raises(TypeError, match=r"builtins\.function\. Open a model .* an API .* write_store"):
            call(lambda texts: texts)
        with pytest.raises(TypeError, match=r"'models/mine'\. Open it: Encoder\.from_pretrained\('models/mine'\)"):
            call("models/mine")
    with pytest.raises(TypeError, match=r"takes a folder or a name, got .*save_pretrained\(path\)"):
        Encoder.from_pretrained(theirs(tiny_bert))


@pytest.mark.parametrize("kind", ["bert", "qwen"])
def test_a_folder_without_its_tokenizer_is_refused(
    copy_of: Callable[..., Path], tiny_model: Callable[..., Path], kind: str
) -> None:
    """transformers makes a tokenizer that knows no word of it, and says nothing."""
    folder = copy_of(tiny_model(kind))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).unlink()
    assert len(AutoTokenizer.from_pretrained(folder)) <= 5
    with pytest.raises(IntegrityError, match=r"no tokenizer \(tokenizer\.json.*save_pretrained\("):
        Encoder.from_pretrained(folder)


def test_a_tokenizer_of_a_few_tokens_is_refused(copy_of: Callable[..., Path], tiny_bert: Path) -> None:
    folder = copy_of(tiny_bert)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).unlink()
    (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n")
    with pytest.raises(IntegrityError, match="knows 5 tokens, and the model has 151"):
        Encoder.from_pretrained(folder)


@pytest.mark.parametrize("other", ["thesis.txt", ".git", "a file"])
def test_other_files_are_not_replaced_by_a_model(bert: Encoder, tmp_path: Path, other: str) -> None:
    path = tmp_path / "model"
    path.mkdir()
    bert.save_pretrained(path)
    (path / "left over").write_text("")
    bert.save_pretrained(path)
    assert not (path / "left over").exists()
    if other != ".git":
        shutil.rmtree(path)
    if other == "a file":
        path.write_text("text")
    else:
        path.mkdir(exist_ok=True)
        (path / other).write_text("text")
    with pytest.raises(RecipeError, match="Name a new folder"):
        bert.save_pretrained(path)
    assert (path if other == "a file" else path / other).read_text() == "text"


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"neither modules\.json nor config\.json"):
        Encoder.from_pretrained(tmp_path)
    with pytest.raises(ResourceError, match="no folder"):
        Encoder.from_pretrained(tmp_path / "nowhere")


# Bad input


@pytest.mark.parametrize("length", [-1, 0, 1, 2, 65])
def test_max_length_has_a_range(tiny_bert: Path, length: int) -> None:
    # Below the special tokens, the tokenizer would not cut at all.
    with pytest.raises(RecipeError, match=rf"max_length is 3\.\.64 tokens for .*, got {length}"):
        Encoder.from_pretrained(tiny_bert, max_length=length)


def test_max_length_cuts_and_says_so(tiny_bert: Path) -> None:
    tokenized = Encoder.from_pretrained(tiny_bert, max_length=5).tokenize(
        ["a", "Two dogs run", "Two dogs run across", ""]
    )
    assert tokenized.tokens.lengths.tolist() == [3, 5, 5, 2]
    assert tokenized.truncated == [False, False, True, False]
    assert tokenized.empty == [False, False, False, True]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("one text", "a list of texts is expected, got one text, 'one text'"),
        (["a", None], "text 1 is NoneType None"),
        (["a", 7], "text 1 is int 7"),
        (["a", "b", b"bytes"], "text 2 is bytes"),
        (["a", "half \ud83d"], "text 1 holds half a surrogate pair at character 5"),
    ],
)
def test_what_is_no_text_is_named(bert: Encoder, unchecked: None, texts: Any, message: str) -> None:
    for encoder in (bert, static_encoder()):
        with pytest.raises(DataError, match=message):
            encoder.encode(texts)


@each_model_and_static
def test_no_texts_give_no_vectors(folder_of: Callable[..., Path], model: Any) -> None:
    encoder = Encoder.from_pretrained(folder_of(model))
    assert encoder.encode([]).shape == encoder(Tokens.from_lists([])).shape == (0, encoder.width)


def test_a_text_without_tokens_is_zero_and_its_gradient_finite(tiny_qwen_left: Path) -> None:
    transformer, static = Encoder.from_pretrained(tiny_qwen_left), static_encoder()
    for encoder in (transformer, static):
        texts = ["", "Two dogs", ""]
        assert encoder.tokenize(texts).empty == [True, False, True]
        vectors = encoder.encode(texts)
        assert not vectors[[0, 2]].any()
        assert vectors[1].norm() == pytest.approx(1)
        assert not encoder.encode([""]).any()
        encoder(encoder.tokenize(texts).tokens).sum().backward()
        assert all(p.grad.isfinite().all() for p in encoder.parameters() if p.grad is not None)


# Identity


def fields_that_differ(one: Encoder, two: Encoder) -> set[str]:
    before, after = one.fingerprint(), two.fingerprint()
    assert set(before) == set(after)
    return {field for field in before if before[field] != after[field]}


def test_each_change_alone_changes_its_own_field(tiny_model: Callable[..., Path], tiny_bert: Path) -> None:
    def fresh() -> Encoder:
        return Encoder.from_pretrained(tiny_bert)

    one = fresh()
    assert not fields_that_differ(one, fresh())
    changed = fresh()
    with torch.no_grad():
        changed.backbone.model.encoder.layer[3].output.dense.bias[0] += 1e-3
    assert fields_that_differ(one, changed) == {"weights"}
    assert fields_that_differ(one, Encoder.from_pretrained(tiny_model("bert", lowercase=False))) == {"tokenizer"}
    changed = fresh()
    changed.backbone.model.config.layer_norm_eps = 1e-6
    assert fields_that_differ(one, changed) == {"config"}
    changed = fresh()
    changed.backbone.pooling = Pooling(tiny.WIDTH, ["cls"])
    assert fields_that_differ(one, changed) == {"modules"}
    assert fields_that_differ(one, Encoder.from_pretrained(tiny_model("bert", head=[]))) == {"modules"}
    assert fields_that_differ(one, Encoder.from_pretrained(tiny_bert, max_length=63)) == {"max_length"}
    changed = fresh()
    changed.lowercase = True
    assert fields_that_differ(one, changed) == {"lowercase"}
    assert fields_that_differ(one, Encoder.from_pretrained(tiny_bert, compute_dtype="bfloat16")) == {"compute_dtype"}


def test_what_changes_no_vector_changes_no_field(tiny_bert: Path, copy_of: Callable[..., Path]) -> None:
    one, other = Encoder.from_pretrained(tiny_bert), Encoder.from_pretrained(copy_of(tiny_bert))
    other.encode(TEXTS)  # sets padding and truncation in the tokenizer
    other.train()
    other.prompts, other.name, other.commit = {"query": "q "}, "other", "f" * 40
    assert not fields_that_differ(one, other)
    json.dumps(one.fingerprint())


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("bert", {}),
        ("mpnet", {}),
        ("qwen", {"padding_side": "left"}),
        ("bert", {"layers": 2, "pooling": MODES}),
    ],
)
def test_a_vector_does_not_depend_on_its_neighbours(tiny_model: Any, kind: str, options: dict[str, Any]) -> None:
    encoder = Encoder.from_pretrained(tiny_model(kind, **options))
    together = encoder.encode(TEXTS)
    assert gap(torch.cat([encoder.encode([text]) for text in TEXTS]), together) <= 1e-6 * encoder.width / tiny.WIDTH
    assert gap(encoder.encode(TEXTS[::-1]).flip(0), together) <= 1e-6 * encoder.width / tiny.WIDTH


def test_absolute_positions_survive_a_tokenizer_that_pads_on_the_left(tiny_bert: Path) -> None:
    encoder = Encoder.from_pretrained(tiny_bert)
    expected = encoder.encode(TEXTS)
    encoder.tokenizer.padding_side = "left"
    assert gap(encoder.encode(TEXTS), expected) <= 1e-6


# Running it


def test_bfloat16_is_close(tiny_mpnet: Path) -> None:
    exact = Encoder.from_pretrained(tiny_mpnet).encode(TEXTS)
    rough = Encoder.from_pretrained(tiny_mpnet, compute_dtype="bfloat16").encode(TEXTS)
    assert rough.dtype == torch.float32
    assert 1e-6 < gap(rough, exact) < 0.05
    assert torch.cosine_similarity(rough, exact).min() > 0.995


def test_encode_leaves_every_part_in_the_mode_it_was_in(bert: Encoder, unchecked: None) -> None:
    bert.train()
    bert.backbone.model.embeddings.eval()
    before = [module.training for module in bert.modules()]
    assert torch.equal(bert.encode(TEXTS), bert.encode(TEXTS)), "dropout was on"
    assert [module.training for module in bert.modules()] == before
    bert.eval()
    bert.encode(TEXTS)
    assert not any(module.training for module in bert.modules())
    bert.train()
    with pytest.raises(DataError):
        bert.encode([*TEXTS, None])
    assert bert.training


def test_vectors_may_be_used_in_a_loss(bert: Encoder) -> None:
    vectors, other = bert.encode(TEXTS), nn.Parameter(torch.ones(tiny.WIDTH, 4))
    (vectors @ other).sum().backward()
    assert other.grad is not None
    assert not vectors.requires_grad


@each_model
def test_every_trained_parameter_gets_a_gradient(folder_of: Callable[..., Path], model: Any) -> None:
    """DDP waits for every parameter that asks for one: poolers, which are never run, must not."""
    encoder = Encoder.from_pretrained(folder_of(model)).train()
    encoder(encoder.tokenize(TEXTS[:4]).tokens).square().sum().backward()
    trained = {key for key, parameter in encoder.named_parameters() if parameter.requires_grad}
    assert trained == {key for key, parameter in encoder.named_parameters() if parameter.grad is not None}
    frozen = {key for key, parameter in encoder.named_parameters() if not parameter.requires_grad}
    assert all("pooler" in key for key in frozen)
    assert bool(frozen) == (model[0] not in ("qwen", "distilbert"))


def test_a_window_is_not_the_end(bert: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [tiny.SENTENCES[number % 12][: 5 + number % 40] for number in range(420)]
    small = Encoder(static_encoder().backbone, static_encoder().tokenizer)
    expected = small.encode(texts)
    monkeypatch.setattr("distill.encoder.WINDOW", 200)  # the second and third are tokenized ahead
    vectors = small.encode(texts)
    assert torch.equal(vectors, expected)
    for number in (0, 199, 200, 419):
        assert gap(vectors[number : number + 1], small.encode([texts[number]])) <= 1e-6


def test_token_vectors_are_those_of_the_tokens_alone(tiny_bert: Path, tiny_qwen: Path) -> None:
    bert, qwen = Encoder.from_pretrained(tiny_bert), Encoder.from_pretrained(tiny_qwen)
    vectors = bert.encode_vocabulary()
    assert vectors.shape == (len(bert.tokenizer), bert.width)
    words = ["dogs", "bridge", "flute"]
    assert gap(vectors[bert.tokenizer.convert_tokens_to_ids(words)], bert.encode(words)) <= 1e-6
    assert bert.single_tokens([9]).ids.tolist() == [2, 9, 3]
    assert qwen.single_tokens([9, 8]).lengths.tolist() == [1, 1]


def test_sizes(bert: Encoder, tiny_bert_cls: Path) -> None:
    assert (bert.width, Encoder.from_pretrained(tiny_bert_cls).width, static_encoder().width) == (32, 24, 12)
    assert static_encoder().max_length == UNLIMITED
    assert (bert.special_token_count, static_encoder().special_token_count) == (2, 0)
    assert bert.parameter_count == sum(parameter.numel() for parameter in bert.parameters())
    assert not bert.training
