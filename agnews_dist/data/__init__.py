"""From rows of text to a rank's batches: corpus, tokens, plan, loader."""
