"""GPT-2 as a classifier: a frozen prefix and a trainable suffix, export to Hugging Face's format and back."""
