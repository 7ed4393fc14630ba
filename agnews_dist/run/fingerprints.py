"""The settings and hashes that a run's weights depend on."""

import hashlib
import json
from collections.abc import Mapping

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from agnews_dist.config.fields import all_settings, values_of
from agnews_dist.config.schema import Config
from agnews_dist.data.token_cache import hash_json
from agnews_dist.model.gpt2 import Classifier


def setting_values(config: Config) -> dict[str, object]:
    """Return dotted key -> value of every setting, as JSON holds it."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values_of(config)}


def weight_settings(config: Config) -> dict[str, object]:
    """Return dotted key -> value of every setting that describes the training: without devices and output locations."""
    found: dict[str, object] = {}
    for key, value in setting_values(config).items():
        setting = all_settings()[key]
        section = setting.section.split(".")[0]
        if setting.resume != "ignored" or (section in ("data", "model", "batch", "optim") and key != "data.cache_dir"):
            found[key] = value
    return found


def weights_fingerprint(state: Mapping[str, Tensor]) -> str:
    """Return the sha256 of names and values."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(value.detach().float().cpu().numpy()).data)
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return the sha256 of everything that turns text into token ids."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    # State of the last call, not of the tokenizer.
    content["padding"] = content["truncation"] = None
    return hash_json(content)


def config_fingerprint(config: Config) -> str:
    """Return the sha256 of the settings. Paths and hub ids are left out: other hashes cover what they hold."""
    hashed = ("data.source", "data.exclude", "model.name")
    return hash_json({key: value for key, value in weight_settings(config).items() if key not in hashed})


def run_fingerprints(
    config: Config, classifier: Classifier, tokenizer: PreTrainedTokenizerFast, *, tokens: str
) -> dict[str, str]:
    """Return sha256 of settings, tokenizer, tokens and frozen weights; `tokens`: the token cache's own fingerprint."""
    return {
        "config": config_fingerprint(config),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "tokens": tokens,
        "frozen_weights": weights_fingerprint(classifier.frozen_state),
    }
