"""Device, precision, memory, and the strategies: DDP, FSDP2, DeepSpeed."""
