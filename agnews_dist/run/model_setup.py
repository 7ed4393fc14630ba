"""A run's model from its configuration: the small files, and the classifier with its trainable part."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import GPT2Config, PreTrainedTokenizerFast

from agnews_dist.config.schema import Config, DataConfig, ModelConfig
from agnews_dist.model.gpt2 import (
    Classifier,
    check_max_length,
    count_parameters,
    count_trainable_blocks,
    load_model_config,
    split_model,
)
from agnews_dist.model.pretrained import load_tokenizer
from agnews_dist.model.saved_model import Backbone, check_config


@dataclass(frozen=True)
class ModelFiles:
    """The small files of a model: tokenizer and config, read once per process."""

    tokenizer: PreTrainedTokenizerFast
    config: GPT2Config


def read_model_files(model: ModelConfig, data: DataConfig) -> ModelFiles:
    """Read tokenizer and config of `model.name`, without its weights.

    Raises:
        ModelError: they cannot be read, are not GPT-2's, or `data.max_length` or `model.trainable_blocks` is too large for it.
    """
    check_config(model.name, model.revision, is_classifier=False)
    tokenizer = load_tokenizer(model.name, revision=model.revision, pad_token=data.pad_token)
    gpt2 = load_model_config(model.name, revision=model.revision, init=model.init, tokenizer=tokenizer)
    check_max_length(data.max_length, gpt2.n_positions)
    count_trainable_blocks(model.trainable_blocks, gpt2.n_layer, train_embeddings=model.train_embeddings)
    return ModelFiles(tokenizer, gpt2)


def build_classifier(config: Config, backbone: Backbone, class_names: Sequence[str]) -> Classifier:
    """Split the model as the settings say, with a head for these classes.

    Raises:
        ModelError: `model.trainable_blocks` exceeds the model's blocks.
    """
    model = config.model
    return split_model(
        backbone,
        trainable_blocks=model.trainable_blocks,
        num_classes=len(class_names),
        seed=config.run.seed,
        class_names=class_names,
        dropout=model.dropout,
        pooling=model.pooling,
        train_embeddings=model.train_embeddings,
    )


def count_trained(config: Config, classifier: Classifier) -> dict[str, tuple[int, int]]:
    """Count (trainable, frozen) parameters of each part, as the solver treats them."""
    parameters = count_parameters(classifier)
    if config.optim.solver == "lbfgs":
        # It solves the head, and the norm stays as it is.
        trainable, frozen = parameters["ln_f"]
        parameters["ln_f"] = frozen, trainable
    return parameters
