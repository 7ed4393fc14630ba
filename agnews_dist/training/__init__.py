"""The loop, one step, checkpoints."""
