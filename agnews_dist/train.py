"""Entry point of a training: `torchrun --nproc_per_node=8 -m agnews_dist.train`; `agnews-dist train` is the same."""

import sys

from agnews_dist.commands import train
from agnews_dist.commands.command import run_command

if __name__ == "__main__":
    sys.exit(run_command(train.COMMAND, None, train.run))
