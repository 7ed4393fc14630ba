"""What a training is told besides its configuration. Stories that go before or after one take the same arguments."""

from agnews_dist.config import command_line as cli
from agnews_dist.storage.locations import HELP

NODE_CACHE = cli.Option("--node_cache", HELP, default="")
TRAINING_OPTIONS = (
    cli.Option(
        "--profile", "Write a torch.profiler trace of a few steps on rank 0 and print the top operators.", bool, False
    ),
    cli.Option(
        "--accept",
        "Settings that may differ from those of the checkpoint that is continued, such as optim.lr; several with commas.",
        default="",
    ),
    NODE_CACHE,
)
