"""The classifier: a frozen prefix and a trainable suffix made from GPT-2, and its way back to Hugging Face's format."""
