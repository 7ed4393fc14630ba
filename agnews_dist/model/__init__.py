"""GPT-2 as a classifier: a frozen prefix and a trainable suffix, export to Hugging Face's format and back."""

from agnews_dist.model.export import export_model, load_classifier
from agnews_dist.model.gpt2 import Classifier

__all__ = ["Classifier", "export_model", "load_classifier"]
