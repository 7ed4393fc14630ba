"""Entry point of a training: `torchrun --nproc_per_node=8 -m agnews_dist.train`; `agnews-dist train` is the same."""

import sys

from agnews_dist.commands.train import main

if __name__ == "__main__":
    sys.exit(main())
