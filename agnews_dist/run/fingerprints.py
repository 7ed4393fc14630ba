"""What the weights of a run are a function of: its settings, by name, and hashes of the data and the frozen weights."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from agnews_dist.config.schema import Config
from agnews_dist.run.setup import TrainingInputs


def settings(config: Config) -> dict[str, object]:
    """Dotted key -> value of all that shaped the weights; where it ran and where it wrote is left out."""
    sections = {"data": config.data, "model": config.model, "batch": config.batch, "optim": config.optim}
    named = {f"{section}.{key}": value for section, part in sections.items() for key, value in asdict(part).items()}
    for key in ("precision", "allow_tf32", "fast_path", "gradient_compression"):
        named[f"engine.{key}"] = getattr(config.engine, key)
    named["run.seed"] = config.run.seed
    del named["data.cache_dir"]
    return named


def fingerprint_of(state: Mapping[str, Tensor]) -> str:
    """sha256 over names and values."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(value.detach().float().cpu().numpy()).data)
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """sha256 of what turns text into ids."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    # The state of its last call.
    content["padding"] = content["truncation"] = None
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def fingerprints(config: Config, sources: TrainingInputs) -> dict[str, str]:
    """sha256 of what the weights depend on: settings, tokenizer, tokens, frozen weights.

    Places (directories, ids) are left out of the settings: what they hold is in the others.
    """
    named = {key: value for key, value in settings(config).items() if key not in ("data.source", "model.name")}
    return {
        "config": hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest(),
        "tokenizer": tokenizer_fingerprint(sources.tokenizer),
        "tokens": sources.store.fingerprint,
        "frozen_weights": fingerprint_of(sources.classifier.frozen_state),
    }
