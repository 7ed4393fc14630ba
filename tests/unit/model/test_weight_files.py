"""Files of weights: copied where that costs little, watched for changes, and never silently other weights."""

import os
from pathlib import Path

import pytest
import torch
from support.tiny_models import save_tiny_model

from agnews_dist.errors import ModelError
from agnews_dist.events import Event, Warned
from agnews_dist.model import weight_files
from agnews_dist.model.gpt2 import Classifier, load_backbone, split_model
from agnews_dist.model.pretrained import load_tokenizer
from agnews_dist.model.weight_files import WeightFiles, copy_weights
from agnews_dist.run.fingerprints import weights_fingerprint


def load(directory: Path, ranks_per_node: int = 1) -> tuple[Classifier, WeightFiles]:
    """Load a tiny model as a training does; of the files of this process, only those of `directory` are watched."""
    save_tiny_model(directory)
    tokenizer = load_tokenizer(str(directory), revision=None, pad_token="eos")
    backbone = load_backbone(str(directory), revision=None, init="pretrained", seed=0, tokenizer=tokenizer)
    classifier = split_model(backbone, trainable_blocks=1, num_classes=4, seed=0)
    files = copy_weights(classifier, ranks_per_node)
    states = {path: state for path, state in files.states.items() if path.is_relative_to(directory)}
    assert list(states) == [directory / "model.safetensors"]
    return classifier, WeightFiles(states, files.are_copied)


def test_copied_weights_survive_a_file_that_is_overwritten_and_it_is_named_once(tmp_path: Path) -> None:
    classifier, files = load(tmp_path)
    events: list[Event] = []
    files.check(events.append)
    before = weights_fingerprint(classifier.frozen_state)
    logits_BC = classifier.logits(torch.tensor([[1, 2, 3]]), torch.tensor([3]))
    os.truncate(tmp_path / "model.safetensors", 0)
    for _ in range(2):
        files.check(events.append)
    assert weights_fingerprint(classifier.frozen_state) == before
    assert torch.equal(classifier.logits(torch.tensor([[1, 2, 3]]), torch.tensor([3])), logits_BC)
    frozen = dict(classifier.prefix.named_parameters())
    assert all(weight.data_ptr() == frozen[name[12:]].data_ptr() for name, weight in classifier.frozen_state.items())
    message = f"model file {tmp_path}/model.safetensors has changed since it was read: this run keeps the weights that it read"
    assert [event.message.startswith(message) for event in events if isinstance(event, Warned)] == [True]


def test_large_weights_stay_mapped_and_a_change_of_their_file_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_files, "MAX_COPIED_SHARE", 0.0)
    classifier, files = load(tmp_path)
    assert not files.are_copied
    assert classifier.frozen_state
    files.check(lambda _: None)
    path = tmp_path / "model.safetensors"
    os.utime(path, ns=(1, 1))
    refusal = rf"model file {path} has changed while the run uses it: .* no longer those that the run began with\. Restore the"
    with pytest.raises(ModelError, match=refusal):
        files.check(lambda _: None)
    # A new file under the name is another one: the mapped pages are those of the old one.
    path.unlink()
    files.check(lambda _: None)


def test_copies_of_many_ranks_must_fit(tmp_path: Path) -> None:
    assert not load(tmp_path, ranks_per_node=10**9)[1].are_copied
