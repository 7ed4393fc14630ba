"""GPT-2 from every source, the errors of sources that cannot be used, and the split into prefix and suffix."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.toy import toy_classifier, toy_model
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    GPT2Model,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as hf_logging

from agnews_dist.distributed.world import World
from agnews_dist.engine.engine import Engine
from agnews_dist.errors import ModelError
from agnews_dist.model.gpt2 import Backbone, check_max_length, count_parameters, load_backbone, load_model_config, split_model
from agnews_dist.model.pretrained import load_tokenizer
from agnews_dist.run.engine_setup import place_classifier

NUM_TOKENS = 2000
CLASS_NAMES = ("World", "Sports", "Business", "Sci/Tech")


def tiny_config(**changes: object) -> GPT2Config:
    shape: dict[str, object] = {
        "vocab_size": NUM_TOKENS,
        "n_positions": 64,
        "n_embd": 16,
        "n_layer": 3,
        "n_head": 2,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return GPT2Config(**(shape | changes))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """The embedded tokenizer with [PAD]: 2,001 tokens."""
    return load_tokenizer("embedded", revision=None, pad_token="new")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same weights saved as three kinds of checkpoint; the classifier has class names."""
    root = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    classifier = GPT2ForSequenceClassification(tiny_config(id2label=dict(enumerate(CLASS_NAMES))))
    language_model = GPT2LMHeadModel(tiny_config())
    language_model.transformer.load_state_dict(classifier.transformer.state_dict())
    saved = {"GPT2Model": classifier.transformer, "GPT2LMHeadModel": language_model, "classifier": classifier}
    for name, model in saved.items():
        model.save_pretrained(root / name)
    return {name: root / name for name in saved}


@pytest.fixture
def broken(checkpoints: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of a language model's directory, to be damaged."""
    return Path(shutil.copytree(checkpoints["GPT2LMHeadModel"], tmp_path / "model"))


def load(name: object, tokenizer: PreTrainedTokenizerFast, *, init: str = "pretrained", seed: int = 0) -> Backbone:
    return load_backbone(str(name), revision=None, init=init, seed=seed, tokenizer=tokenizer)  # type: ignore[arg-type]


def edit_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- pretrained weights


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["GPT2Model", "GPT2LMHeadModel", "classifier"])
def test_three_kinds_of_checkpoint_give_the_same_backbone(
    checkpoints: dict[str, Path], tokenizer: PreTrainedTokenizerFast, kind: str
) -> None:
    backbone = load(checkpoints[kind], tokenizer)
    assert type(backbone.model) is GPT2Model
    assert backbone.model.config._attn_implementation == "sdpa"
    saved = load_file(checkpoints["GPT2Model"] / "model.safetensors")
    weights = dict(backbone.model.named_parameters())
    assert len(weights) == len(saved) == 3 * 12 + 4
    for name, weight in weights.items():
        assert weight.dtype == torch.float32
        assert weight.device.type == "cpu"
        assert torch.equal(weight[:NUM_TOKENS], saved[name]), name
    mean = saved["wte.weight"].mean(dim=0)
    assert weights["wte.weight"].shape == (NUM_TOKENS + 1, 16)
    assert torch.allclose(weights["wte.weight"][-1], mean, atol=1e-8)
    assert backbone.model.config.vocab_size == NUM_TOKENS + 1
    assert backbone.model.config.pad_token_id == NUM_TOKENS
    if kind == "classifier":
        assert backbone.class_names == CLASS_NAMES
        assert backbone.head_CD is not None
        assert torch.equal(backbone.head_CD, load_file(checkpoints[kind] / "model.safetensors")["score.weight"])
    else:
        assert (backbone.head_CD, backbone.class_names) == (None, None)


@pytest.mark.slow
def test_half_precision_checkpoint_trains_in_exact_fp32_and_stays_frozen_as_stored(shared: Path) -> None:
    checkpoint = shared / "checkpoints" / "gpt2-mini"
    tokenizer = load_tokenizer(str(checkpoint), revision=None, pad_token="new")
    classifier = split_model(load(checkpoint, tokenizer), trainable_blocks=2, num_classes=4, seed=0)
    saved = load_file(checkpoint / "model.safetensors")
    assert saved["transformer.h.0.mlp.c_fc.weight"].dtype == torch.bfloat16
    frozen = classifier.frozen_state
    trained = {f"transformer.{name}": weight for name, weight in classifier.suffix.named_parameters()}
    assert {weight.dtype for weight in frozen.values()} == {torch.bfloat16}
    assert {weight.dtype for weight in trained.values()} == {torch.float32}
    assert len(frozen | trained) == len(saved) + 2
    for name, weight in saved.items():
        assert torch.equal((frozen | trained)[name][:50257].float(), weight.float()), name
    assert classifier.prefix.wte.num_embeddings == 50258
    place_classifier(
        classifier, Engine(World(), device="cpu", precision="fp32", allow_tf32=False, timeout_seconds=60), fast_path=True
    )
    assert {weight.dtype for weight in classifier.prefix.parameters()} == {torch.float32}


def test_eos_as_pad_token_adds_no_embedding_row(checkpoints: dict[str, Path]) -> None:
    model = load(checkpoints["GPT2Model"], load_tokenizer("embedded", revision=None, pad_token="eos")).model
    assert (model.wte.num_embeddings, model.config.pad_token_id) == (NUM_TOKENS, 0)


def test_spare_embedding_rows_are_used_for_the_pad_token(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Many checkpoints round the vocabulary up to a multiple of 64 or 128."""
    GPT2Model(tiny_config(vocab_size=2048)).save_pretrained(tmp_path)
    assert load(tmp_path, tokenizer).model.wte.num_embeddings == 2048


def test_old_checkpoints_with_causal_mask_buffers_load(broken: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """OpenAI's GPT-2 on the hub has such buffers: h.0.attn.bias and h.0.attn.masked_bias."""
    state = load_file(broken / "model.safetensors")
    for block in range(3):
        state[f"transformer.h.{block}.attn.bias"] = torch.ones(1, 1, 64, 64)
        state[f"transformer.h.{block}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(state, broken / "model.safetensors", metadata={"format": "pt"})
    assert len(load(broken, tokenizer).model.h) == 3


def test_pickled_weights_load_without_running_code(broken: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """torch's weights_only reader accepts tensors and refuses anything that would call a function."""
    state = load_file(broken / "model.safetensors")
    (broken / "model.safetensors").unlink()
    torch.save(state, broken / "pytorch_model.bin")
    weight = load(broken, tokenizer).model.ln_f.weight
    assert torch.equal(weight, state["transformer.ln_f.weight"])

    class Bomb:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
            return (Path(broken / "bomb").write_text, ("exploded",))

    torch.save(state | {"bomb": Bomb()}, broken / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"weights in .* cannot be read: .*Copy or download"):
        load(broken, tokenizer)
    assert not (broken / "bomb").exists()


def test_loading_is_silent_and_leaves_global_state_alone(
    checkpoints: dict[str, Path], tokenizer: PreTrainedTokenizerFast, capfd: pytest.CaptureFixture[str]
) -> None:
    before = torch.get_rng_state()
    verbosity, has_bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    load(checkpoints["classifier"], tokenizer)
    load(checkpoints["GPT2Model"], tokenizer, init="random", seed=3)
    split_model(load("embedded", tokenizer), trainable_blocks=1, num_classes=4, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert (hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()) == (verbosity, has_bars)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == ""


def test_load_backbone_with_a_config_reads_no_config_and_leaves_it_unchanged(
    broken: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """A training reads config.json once, for the memory check and for the model."""
    config = load_model_config(str(broken), revision=None, init="pretrained", tokenizer=tokenizer)
    before = config.to_dict()
    expected = load(broken, tokenizer).model
    (broken / "config.json").unlink()
    for init in ("pretrained", "random"):
        model = load_backbone(str(broken), revision=None, init=init, seed=1, tokenizer=tokenizer, config=config).model
        assert model.config.to_dict().keys() == expected.config.to_dict().keys()
        assert model.wte.weight.shape == expected.wte.weight.shape
        assert torch.equal(model.wte.weight, expected.wte.weight) == (init == "pretrained")
    assert config.to_dict() == before


# --- random weights


def test_random_weights_come_from_the_seed_alone(
    checkpoints: dict[str, Path], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    shutil.copy(checkpoints["classifier"] / "config.json", tmp_path)  # it reads nothing else
    first, again = (load(tmp_path, tokenizer, init="random", seed=4) for _ in range(2))
    other = load(tmp_path, tokenizer, init="random", seed=5)
    assert (first.head_CD, first.class_names) == (None, None)
    matrix = "h.1.mlp.c_fc.weight"
    assert torch.equal(first.model.get_parameter(matrix), again.model.get_parameter(matrix))
    assert not torch.equal(first.model.get_parameter(matrix), other.model.get_parameter(matrix))
    assert first.model.get_parameter(matrix).std().item() == pytest.approx(0.02, rel=0.1)
    assert first.model.get_parameter("h.1.mlp.c_proj.weight").std().item() == pytest.approx(0.02 / 6**0.5, rel=0.1)
    assert not first.model.training


@pytest.mark.slow
def test_a_directory_with_only_a_tokenizer_is_gpt2_small(shared: Path) -> None:
    directory = shared / "tokenizers" / "gpt2"
    models = {}
    for pad_token in ("new", "eos"):
        tokenizer = load_tokenizer(str(directory), revision=None, pad_token=pad_token)  # type: ignore[arg-type]
        models[pad_token] = load(directory, tokenizer, init="random").model
    config = models["new"].config
    assert (config.n_layer, config.n_embd, config.n_head, config.n_positions) == (12, 768, 12, 1024)
    assert models["new"].wte.num_embeddings == 50258
    assert models["eos"].wte.num_embeddings == 50257
    assert torch.equal(models["new"].h[11].mlp.c_fc.weight, models["eos"].h[11].mlp.c_fc.weight)


def test_embedded_model(tokenizer: PreTrainedTokenizerFast) -> None:
    """'pretrained' is one fixed draw; 'random' depends on the run's seed."""
    first, again = load("embedded", tokenizer, seed=1).model, load("embedded", tokenizer, seed=2).model
    assert torch.equal(first.wte.weight, again.wte.weight)
    drawn = load("embedded", tokenizer, init="random", seed=1).model
    assert not torch.equal(first.wte.weight, drawn.wte.weight)
    assert first.wte.num_embeddings == len(tokenizer) == NUM_TOKENS + 1
    assert first.config.eos_token_id == tokenizer.eos_token_id == 0


# --- errors


def _no_weights(directory: Path) -> None:
    (directory / "model.safetensors").unlink()


def _no_config(directory: Path) -> None:
    (directory / "config.json").unlink()


def _damaged_config(directory: Path) -> None:
    (directory / "config.json").write_text("{")


def _truncated(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def _empty(directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(b"")


def _missing_weight(directory: Path) -> None:
    state = load_file(directory / "model.safetensors")
    del state["transformer.h.1.mlp.c_fc.weight"]
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})


def _nan(directory: Path) -> None:
    state = load_file(directory / "model.safetensors")
    state["transformer.h.2.ln_1.bias"][3] = float("nan")
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})


def _bert(directory: Path) -> None:
    BertModel(BertConfig(vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1)).save_pretrained(directory)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_no_weights, r"it has no weights \(none of model.safetensors.*Copy the whole model directory, or set --model.init"),
        (_no_config, r"it has no config.json\. Copy the whole model directory"),
        (_damaged_config, r"config.json in .* cannot be read: OSError.*Copy or download"),
        (_truncated, r"weights in .* cannot be read: SafetensorError.*Copy or download"),
        (_empty, r"weights in .* cannot be read: SafetensorError.*Copy or download"),
        (_missing_weight, r"weights of model .*: 1 are missing, such as h.1.mlp.c_fc.weight.*Copy the whole"),
        (_nan, r"weight h.2.ln_1.bias of model .* contains NaN.*Use a checkpoint from before"),
        (_bert, r"is a 'bert' model: only GPT-2.*Choose a GPT-2"),
        (lambda d: edit_config(d, n_layer=4), r"12 are missing, such as h.3.\S+ Copy the whole"),
        (lambda d: edit_config(d, n_layer=2), r"11 belong to blocks beyond those of config.json, such as \S*h.2.\S+ Copy"),
        (lambda d: edit_config(d, n_embd=32), r"40 have another shape than in config.json, such as \S+ Copy"),
        (lambda d: edit_config(d, n_embd="wide"), r"config.json of .*: it describes no possible model \(.*n_embd.*Correct"),
        (lambda d: edit_config(d, add_cross_attention=True), r"has add_cross_attention: .*Choose a GPT-2 without"),
        (lambda d: edit_config(d, n_head=5), r"config.json of .*: it describes no possible model \(`embed_dim` must be divis"),
    ],
    ids=lambda value: value.__name__.strip("_") if callable(value) else "",
)
def test_damaged_directories(
    broken: Path, tokenizer: PreTrainedTokenizerFast, damage: Callable[[Path], None], message: str
) -> None:
    load(broken, tokenizer)
    damage(broken)
    with pytest.raises(ModelError, match=message):
        load(broken, tokenizer)


def test_missing_models(checkpoints: dict[str, Path], tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"'\./runs/gone/model' does not exist: .*Correct the path"):
        load("./runs/gone/model", tokenizer)
    with pytest.raises(ModelError, match=r"'runs/gone/model' does not exist: .*Correct the path"):
        load("runs/gone/model", tokenizer)
    with pytest.raises(ModelError, match=r"is a file: .*Set --model.name to its directory"):
        load(checkpoints["GPT2Model"] / "model.safetensors", tokenizer)
    for init in ("pretrained", "random"):
        with pytest.raises(ModelError, match=r"'gpt2': it is neither a directory nor in .*set --model.name to a directory"):
            load("gpt2", tokenizer, init=init)
        with pytest.raises(ModelError, match=r"it has no config.json\. Copy the whole model directory"):
            load(tmp_path, tokenizer, init=init)


def test_impossible_random_shape(broken: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    edit_config(broken, n_head=5)
    with pytest.raises(ModelError, match=r"describes no possible model \(.*divisible.*Correct config.json"):
        load(broken, tokenizer, init="random")
    edit_config(broken, n_head=2, activation_function="wiggle")
    with pytest.raises(ModelError, match=r"describes no possible model \(.*wiggle.*Correct config.json"):
        load(broken, tokenizer, init="random")


@pytest.mark.parametrize("num_rows", [1999, 1500, 3025, 50257])
def test_a_tokenizer_of_another_model(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, num_rows: int) -> None:
    GPT2Model(tiny_config(vocab_size=num_rows, n_layer=1)).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=rf"2001 tokens for model .* with {num_rows} embedding rows: .*Use the tokenizer"):
        load(tmp_path, tokenizer)


def test_one_token_more_that_is_not_the_pad_token(tmp_path: Path) -> None:
    GPT2Model(tiny_config(vocab_size=NUM_TOKENS - 1)).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"2000 tokens for model .* with 1999 embedding rows"):
        load(tmp_path, load_tokenizer("embedded", revision=None, pad_token="eos"))


def test_max_length_above_the_positions() -> None:
    check_max_length(512, 512)
    with pytest.raises(ModelError, match=r"max_length 513: the model has 512 positions\. .*at most 512"):
        check_max_length(513, 512)


# --- the split


@pytest.mark.parametrize("trainable_blocks", [-1, 4])
def test_split_model_rejects_a_wrong_number_of_blocks(
    checkpoints: dict[str, Path], tokenizer: PreTrainedTokenizerFast, trainable_blocks: int
) -> None:
    backbone = load(checkpoints["GPT2Model"], tokenizer)
    message = rf"trainable_blocks {trainable_blocks}: the model has 3 blocks\. .*between 0 and 3, or to all"
    with pytest.raises(ModelError, match=message):
        split_model(backbone, trainable_blocks=trainable_blocks, num_classes=4, seed=0)


@pytest.mark.parametrize(("trainable_blocks", "parts"), [(0, "h.0-2"), (1, "h.0-1 h.2"), (2, "h.0 h.1-2"), ("all", "h.0-2")])
def test_split_model_freezes_all_but_the_last_blocks(
    checkpoints: dict[str, Path], tokenizer: PreTrainedTokenizerFast, trainable_blocks: int | str, parts: str
) -> None:
    backbone = load(checkpoints["GPT2LMHeadModel"], tokenizer)
    num_parameters = sum(p.numel() for p in backbone.model.parameters()) + 4 * 16 + 4
    classifier = split_model(backbone, trainable_blocks=trainable_blocks, num_classes=4, seed=0)  # type: ignore[arg-type]
    table = count_parameters(classifier)
    assert list(table) == ["embeddings", *parts.split(), "ln_f", "out_head"]
    block = 12 * 16 * 16 + 13 * 16
    num_trainable = 3 if trainable_blocks == "all" else int(trainable_blocks)
    assert table["embeddings"] == (0, (2001 + 64) * 16)
    assert table["ln_f"] == (32, 0)
    assert table["out_head"] == (4 * 16 + 4, 0)
    assert sum(trainable for trainable, _ in table.values()) == num_trainable * block + 32 + 68
    assert sum(trainable + frozen for trainable, frozen in table.values()) == num_parameters
    for trainable, frozen in table.values():
        assert (trainable == 0) != (frozen == 0)
    names = [name for name, _ in classifier.suffix.named_parameters()]
    hf_names = set(GPT2ForSequenceClassification(tiny_config()).state_dict())
    mapped = {"score.weight" if name == "out_head.weight" else f"transformer.{name}" for name in names}
    mapped.remove("transformer.out_head.bias")
    assert not mapped & set(classifier.frozen_state)
    assert mapped | set(classifier.frozen_state) == hf_names


def test_out_head_is_drawn_from_the_seed(checkpoints: dict[str, Path], tokenizer: PreTrainedTokenizerFast) -> None:
    def head(seed: int, num_classes: int = 500) -> torch.nn.Linear:
        backbone = load(checkpoints["GPT2Model"], tokenizer)
        return split_model(backbone, trainable_blocks=1, num_classes=num_classes, seed=seed).suffix.out_head

    assert torch.equal(head(1).weight, head(1).weight)
    assert not torch.equal(head(1).weight, head(2).weight)
    assert head(1).weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert head(1).bias is None, "more classes than width"
    assert not head(1, num_classes=8).bias.any()
    drawn = load(checkpoints["GPT2Model"], tokenizer, init="random", seed=1).model.wte.weight
    assert not torch.equal(head(1).weight[:4], drawn[:4]), "head and embedding of one seed are different numbers"


def test_split_model_keeps_a_head_of_the_right_shape(checkpoints: dict[str, Path], tokenizer: PreTrainedTokenizerFast) -> None:
    saved = load_file(checkpoints["classifier"] / "model.safetensors")["score.weight"]
    kept = split_model(load(checkpoints["classifier"], tokenizer), trainable_blocks=1, num_classes=4, seed=0)
    assert torch.equal(kept.suffix.out_head.weight, saved)
    other = split_model(load(checkpoints["classifier"], tokenizer), trainable_blocks=1, num_classes=5, seed=0)
    assert other.suffix.out_head.weight.shape == (5, 16)


def test_split_model_sets_the_dropout_of_the_suffix_alone() -> None:
    backbone = Backbone(toy_model(0.1), None, None)
    classifier = split_model(backbone, trainable_blocks=2, num_classes=4, seed=5, dropout=0.2)

    def rates(part: torch.nn.Module) -> list[float]:
        return [module.p for module in part.modules() if isinstance(module, torch.nn.Dropout)]

    assert (rates(classifier.suffix), rates(classifier.prefix)) == ([0.2] * 6, [0.1] * 3)
    config = classifier.config
    assert (config.attn_pdrop, config.resid_pdrop) == (0.1, 0.1), "the export keeps the model's own rates"
    # The masks are those of a model that has this rate.
    kept, keys_B = toy_classifier(2, dropout=0.2), torch.tensor([5, 6])
    hidden_BTD, lengths_B = torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(1)), torch.tensor([7, 3])
    classifier.suffix.load_state_dict(kept.suffix.state_dict())
    outputs = []
    for suffix, is_training in ((kept.suffix, True), (classifier.suffix, True), (classifier.suffix, False)):
        torch.manual_seed(3)
        outputs.append(suffix.train(is_training)(hidden_BTD, lengths_B, keys_B))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.allclose(outputs[0], outputs[2]), "control: dropout has an effect"
