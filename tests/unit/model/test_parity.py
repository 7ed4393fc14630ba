"""Our classifier, on both paths, against Hugging Face's GPT2ForSequenceClassification with its attention mask, in fp32.

Gradients are compared without dropout, as the two draw masks in different order and for different blocks.
"""

import json
from collections import Counter

import pytest
import torch
from support.random_gpt2 import NUM_CLASSES, RELATIVE, assert_close, mask_of, ours_like, ragged_batch, random_reference
from torch import Tensor, nn
from torch.nn import functional
from transformers import GPT2ForSequenceClassification
from transformers.models.gpt2.modeling_gpt2 import GPT2Block

from agnews_dist.model.gpt2 import Classifier, load_backbone, split_model
from agnews_dist.model.pretrained import load_tokenizer
from agnews_dist.model.suffix import LastBlock

END_OF_TEXT = 50256
BOTH_PATHS = pytest.mark.parametrize("fast_path", [True, False], ids=["fast", "plain"])


def huggingface_name(name: str) -> str:
    return "score.weight" if name == "out_head.weight" else f"transformer.{name}"


def count_forwards(classifier: Classifier) -> Counter[str]:
    """Return a counter of the runs of each block's Hugging Face forward, updated from now on."""
    counts: Counter[str] = Counter()
    for half in (classifier.prefix, classifier.suffix):
        for number, block in half.h.items():
            huggingfaces = block.block if isinstance(block, LastBlock) else block
            assert isinstance(huggingfaces, GPT2Block)
            huggingfaces.register_forward_hook(lambda *_, number=number: counts.update([number]))
    return counts


def check_parity(
    reference: GPT2ForSequenceClassification, classifier: Classifier, batch: tuple[Tensor, Tensor], *, fast_path: bool
) -> None:
    """Check logits, loss and every gradient of the trainable part, and that the right path has run."""
    classifier.use_fast_path(fast_path)
    forwards = count_forwards(classifier)
    tokens_BT, lengths_B = batch
    labels_B = torch.arange(len(lengths_B)) % NUM_CLASSES
    reference.zero_grad()
    expected = reference(input_ids=tokens_BT, attention_mask=mask_of(tokens_BT, lengths_B), labels=labels_B)
    expected.loss.backward()

    logits_BC = classifier.logits(tokens_BT, lengths_B)
    loss = functional.cross_entropy(logits_BC, labels_B)
    loss.backward()

    frozen, trained = list(classifier.prefix.h), list(classifier.suffix.h)
    assert forwards == Counter(trained[:-1] if fast_path else frozen + trained)
    assert_close(logits_BC.detach(), expected.logits.detach(), "logits")
    assert_close(loss.detach(), expected.loss.detach(), "loss")
    gradients = dict(reference.named_parameters())
    trainable = dict(classifier.suffix.named_parameters())
    assert len(trainable) == 12 * len(classifier.suffix.h) + 4
    for name, weight in trainable.items():
        assert weight.grad is not None, name
        if name == "out_head.bias":  # Hugging Face's head has no bias: computed from its logits
            onehot_BC = functional.one_hot(labels_B, NUM_CLASSES)
            gradient = (expected.logits.detach().softmax(-1) - onehot_BC).mean(dim=0)
        else:
            gradient = gradients[huggingface_name(name)].grad
            assert gradient is not None
        assert gradient.abs().max() > 1e-6, name
        assert_close(weight.grad, gradient, name)
    assert all(weight.grad is None and not weight.requires_grad for weight in classifier.prefix.parameters())


@BOTH_PATHS
@pytest.mark.parametrize("trainable_blocks", [0, 1, 2, "all"])
@pytest.mark.parametrize("pad_id", [0, 96], ids=["pad is end-of-text", "pad is a new last row"])
def test_random_gpt2_equals_huggingface(trainable_blocks: int | str, pad_id: int, fast_path: bool) -> None:
    reference = random_reference(pad_token_id=pad_id)
    batch = ragged_batch(list(range(1, 18)), low=1, high=96, pad_id=pad_id)
    check_parity(reference, ours_like(reference, trainable_blocks), batch, fast_path=fast_path)


@BOTH_PATHS
@pytest.mark.parametrize("pad_id", [0, 96], ids=["pad is end-of-text", "pad is a new last row"])
def test_trained_embeddings_equal_huggingface(pad_id: int, fast_path: bool) -> None:
    """Check the gradient of every parameter of the whole model, without any frozen part."""
    reference = random_reference(pad_token_id=pad_id)
    tokens_BT, lengths_B = ragged_batch(list(range(1, 18)), low=1, high=96, pad_id=pad_id)
    classifier = ours_like(reference, "all", fast_path=fast_path, train_embeddings=True)
    labels_B = torch.arange(len(lengths_B)) % NUM_CLASSES
    expected = reference(input_ids=tokens_BT, attention_mask=mask_of(tokens_BT, lengths_B), labels=labels_B)
    expected.loss.backward()
    logits_BC = classifier.logits(tokens_BT, lengths_B)
    functional.cross_entropy(logits_BC, labels_B).backward()
    assert_close(logits_BC.detach(), expected.logits.detach(), "logits")
    trained = {huggingface_name(name): weight for name, weight in classifier.suffix.named_parameters()}
    trained.pop("transformer.out_head.bias")
    gradients = {name: weight.grad for name, weight in reference.named_parameters()}
    assert trained.keys() == gradients.keys(), "all of Hugging Face's parameters, under their names"
    for name, weight in trained.items():
        assert_close(weight.grad, gradients[name], name)  # type: ignore[arg-type]
    gradient_VD = classifier.suffix.wte.weight.grad
    assert gradient_VD is not None
    assert not gradient_VD[pad_id].any(), "padding has no gradient"
    assert gradient_VD.abs().amax(dim=1).count_nonzero() > 40
    assert not list(classifier.prefix.parameters())


def test_dropout_after_trained_embeddings_is_gpt2s() -> None:
    """Check it against Hugging Face's own, by the same random state: it is the first draw of a forward pass."""
    reference = random_reference(attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.3, pad_token_id=0)
    classifier = ours_like(reference, "all", train_embeddings=True)
    tokens_BT, lengths_B = ragged_batch([6, 6, 6], low=1, high=97, pad_id=0)
    outputs = []
    for module in (reference.train(), classifier.suffix.train()):
        torch.manual_seed(1)
        with torch.no_grad():
            outputs.append(module(input_ids=tokens_BT).logits if module is reference else module(tokens_BT, lengths_B))
    assert_close(outputs[1], outputs[0], "logits")
    other = ours_like(reference, "all", train_embeddings=True, dropout=0.0)
    assert not torch.allclose(other.suffix.train()(tokens_BT, lengths_B), outputs[0]), "control: dropout has an effect"


SAME_FUNCTION: list[dict[str, object]] = [{"reorder_and_upcast_attn": True}, {"activation_function": "gelu_pytorch_tanh"}]


@pytest.mark.slow
@BOTH_PATHS
@pytest.mark.parametrize(
    "change",
    [
        {"scale_attn_by_inverse_layer_idx": True},
        {"reorder_and_upcast_attn": True},
        {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
        {"scale_attn_weights": False},
        {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True},
        {"n_inner": 40},
        {"n_head": 1},
        {"n_head": 24},
        {"activation_function": "relu"},
        {"activation_function": "gelu"},
        {"activation_function": "gelu_pytorch_tanh"},
        {"activation_function": "quick_gelu"},
        {"activation_function": "silu"},
        {"layer_norm_epsilon": 0.1},
    ],
    ids=str,
)
def test_every_shape_of_gpt2_equals_huggingface(change: dict[str, object], fast_path: bool) -> None:
    """The reference uses eager attention, which supports all of these options."""
    reference = random_reference(attention="eager", pad_token_id=0, **change)
    batch = ragged_batch([3, 1, 17, 9], low=1, high=97, pad_id=0)
    # With and without a trainable block: without one, the prefix's last block runs for the last token only.
    for trainable_blocks in (0, 2):
        check_parity(reference, ours_like(reference, trainable_blocks), batch, fast_path=fast_path)

    ordinary = random_reference(attention="eager", pad_token_id=0)
    # Some options change the shapes, some compute the same function in fp32.
    if not (set(change) & {"n_inner"} or change in SAME_FUNCTION):
        same_weights = ours_like(ordinary, 2, fast_path=fast_path)
        changed = ours_like(reference, 2, fast_path=fast_path)
        logits_BC = changed.logits(*batch)
        difference = (same_weights.logits(*batch) - logits_BC).abs().max()
        assert difference > 5 * RELATIVE * logits_BC.abs().max(), "control: the option has an effect"


TEXTS = [
    "Oil prices rise",
    "A",
    "The United Nations said on Friday that talks between both countries would be held again before the end of the month.",
    "Red Sox win the World Series for the first time since 1918, ending 86 years of waiting \N{BASEBALL}",
    "Intel Corp. (INTC) cuts its forecast; shares fall 5% in after-hours trading",
]


@pytest.mark.slow
@BOTH_PATHS
@pytest.mark.parametrize("pad_token", ["new", "eos"])
def test_trained_gpt2_equals_huggingface(shared, pad_token: str, fast_path: bool) -> None:
    checkpoint = shared / "checkpoints" / "gpt2-mini"
    tokenizer = load_tokenizer(str(checkpoint), revision=None, pad_token=pad_token)  # type: ignore[arg-type]
    reference = GPT2ForSequenceClassification.from_pretrained(checkpoint, num_labels=NUM_CLASSES, dtype=torch.float32)
    if pad_token == "new":
        reference.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    reference.config.pad_token_id = tokenizer.pad_token_id
    reference.eval()

    encoded = tokenizer(TEXTS, padding=True, return_tensors="pt")
    lengths_B = encoded["attention_mask"].sum(dim=1)
    assert lengths_B.min() == 1
    assert lengths_B.max() > 20
    for trainable_blocks in (0, 1, 2, "all"):
        backbone = load_backbone(str(checkpoint), revision=None, init="pretrained", seed=0, tokenizer=tokenizer)
        classifier = split_model(backbone, trainable_blocks=trainable_blocks, num_classes=NUM_CLASSES, seed=5)
        classifier.prefix.float()  # stored in bf16
        with torch.no_grad():
            reference.score.weight.copy_(classifier.suffix.out_head.weight)
        check_parity(reference, classifier, (encoded["input_ids"], lengths_B), fast_path=fast_path)


@BOTH_PATHS
@pytest.mark.parametrize("trainable_blocks", [0, 1, "all"])
def test_logits_depend_on_the_example_alone(trainable_blocks: int | str, fast_path: bool) -> None:
    """Change the batch, the padding and the pad id, also in texts that contain the pad id."""
    classifier = ours_like(random_reference(), trainable_blocks, fast_path=fast_path)
    lengths = [1, 4, 11, 16, 7]
    tokens_BT, lengths_B = ragged_batch(lengths, low=1, high=97, pad_id=0)
    tokens_BT[1, 3] = tokens_BT[2, 5] = 0  # the pad id as last and as inner token of a text
    with torch.no_grad():
        together_BC = classifier.logits(tokens_BT, lengths_B)
        for row, length in enumerate(lengths):
            alone_C = classifier.logits(tokens_BT[row : row + 1, :length], lengths_B[row : row + 1])[0]
            assert_close(together_BC[row], alone_C, f"row {row} in a batch")
        for pad_id in (0, 50, 96):
            is_padding_BT = torch.arange(tokens_BT.shape[1] + 9) >= lengths_B[:, None]
            longer_BT = functional.pad(tokens_BT, (0, 9)).masked_fill(is_padding_BT, pad_id)
            assert_close(classifier.logits(longer_BT, lengths_B), together_BC, f"pad id {pad_id}, 9 more columns")


def test_pooling_by_pad_id_is_wrong() -> None:
    """Control: Hugging Face reads an earlier token if, and only if, a text ends in the pad id."""
    reference = random_reference(pad_token_id=0)
    classifier = ours_like(reference, 1)
    tokens_BT, lengths_B = ragged_batch([6, 9, 12], low=1, high=97, pad_id=0)
    tokens_BT[1, 8] = 0  # ends in the pad id
    tokens_BT[2, 4] = 0  # has it in the middle
    with torch.no_grad():
        by_id_BC = reference(input_ids=tokens_BT, attention_mask=mask_of(tokens_BT, lengths_B)).logits
        by_length_BC = classifier.logits(tokens_BT, lengths_B)
        reference.config.pad_token_id = 96  # an id that row 1 does not contain, and no padding: the true last token
        right_C = reference(input_ids=tokens_BT[1:2, :9]).logits[0]
    assert_close(by_length_BC[0], by_id_BC[0], "no pad id in the text")
    assert_close(by_length_BC[2], by_id_BC[2], "pad id in the middle")
    assert (by_length_BC[1] - by_id_BC[1]).abs().max() > 0.05
    assert_close(by_length_BC[1], right_C, "the true last token")


@BOTH_PATHS
def test_dropout_is_active_in_the_suffix_only(fast_path: bool) -> None:
    reference = random_reference(resid_pdrop=0.5, attn_pdrop=0.5, embd_pdrop=0.5)
    classifier = ours_like(reference, 2, fast_path=fast_path)
    tokens_BT, lengths_B = ragged_batch([5, 8], low=1, high=97, pad_id=0)
    whole = nn.ModuleList([classifier.prefix, classifier.suffix]).train()
    assert whole.training
    assert classifier.suffix.training
    assert not any(module.training for module in classifier.prefix.modules())
    assert sum(isinstance(module, nn.Dropout) for module in classifier.prefix.modules()) == 6
    hidden_BTD = classifier.prefix.features(tokens_BT, lengths_B).hidden_BTD
    assert torch.equal(hidden_BTD, classifier.prefix.features(tokens_BT, lengths_B).hidden_BTD)
    assert not torch.allclose(classifier.suffix(hidden_BTD, lengths_B), classifier.suffix(hidden_BTD, lengths_B))
    classifier.suffix.eval()
    assert torch.equal(classifier.suffix(hidden_BTD, lengths_B), classifier.suffix(hidden_BTD, lengths_B))


@BOTH_PATHS
def test_hidden_states_enter_autograd_as_a_constant(fast_path: bool) -> None:
    """Autograd refuses to save inference tensors for the backward pass of the suffix."""
    classifier = ours_like(random_reference(), 1, fast_path=fast_path)
    tokens_BT, lengths_B = ragged_batch([5, 8], low=1, high=97, pad_id=0)
    hidden_BTD = classifier.prefix.features(tokens_BT, lengths_B).hidden_BTD
    assert not hidden_BTD.requires_grad
    assert not hidden_BTD.is_inference()
    classifier.suffix(hidden_BTD, lengths_B).sum().backward()
    assert classifier.suffix.h["3"].ln_1.weight.grad is not None


@BOTH_PATHS
@pytest.mark.parametrize("trainable_blocks", [0, 1])
def test_low_precision_prefix_leaves_residual_stream_and_logits_in_fp32(trainable_blocks: int, fast_path: bool) -> None:
    """With bf16 features and autocast, as on a GPU, logits are within bf16's rounding of fp32 and not rounded."""
    classifier = ours_like(random_reference(), trainable_blocks, fast_path=fast_path)
    tokens_BT, lengths_B = ragged_batch([5, 8, 3, 9], low=1, high=97, pad_id=0)
    exact_BC = classifier.logits(tokens_BT, lengths_B).detach()
    classifier.prefix.to(torch.bfloat16)
    features = classifier.prefix.features(tokens_BT, lengths_B)
    assert features.hidden_BTD.dtype == torch.bfloat16
    classifier.suffix.autocast_dtype = torch.bfloat16
    logits_BC = classifier.suffix(*features)
    assert logits_BC.dtype == torch.float32
    assert not torch.equal(logits_BC, logits_BC.bfloat16().float())
    assert (logits_BC - exact_BC).abs().max() < 0.05 * exact_BC.abs().max()
    frozen = classifier.frozen_state["transformer.h.0.mlp.c_fc.weight"]
    assert frozen.dtype == torch.float32
    assert not torch.equal(frozen, frozen.bfloat16().float()), "the fp32 original is kept"


def test_reference_checkpoint_has_dropout_and_no_pad_token(shared) -> None:
    """With dropout, eval mode matters; without a pad token, both options of pad_token have an effect."""
    config = json.loads((shared / "checkpoints" / "gpt2-mini" / "config.json").read_text())
    assert config["resid_pdrop"] == 0.1
    assert config["pad_token_id"] is None
    assert config["eos_token_id"] == END_OF_TEXT
