"""Which examples form each global batch, how ranks share one, and the batches themselves."""
