"""Forecast of the batches before a job: steps, padding, balance of the ranks, text lengths.

Takes the configuration of the training. Needs the text and the model's config and tokenizer, but no weights. With --json,
standard output is one JSON object and everything else goes to standard error.
"""

import sys
from contextlib import closing
from functools import partial

from agnews_dist.commands.arguments import Command, Loaded, Option
from agnews_dist.commands.command import importing
from agnews_dist.config.schema import Count
from agnews_dist.distributed.world import World

COMMAND = Command(
    "plan",
    "Show the batches of a training before it runs: steps, padding, balance of the ranks. Loads no weights.",
    (
        "agnews-dist plan --config my.yaml --ranks 8",
        "agnews-dist plan --data.source data/news --model.name models/gpt2 --ranks 64",
        "agnews-dist plan --config my.yaml --json",
    ),
    (
        Option("--ranks", "Ranks of the training; default: those of this launch.", Count | None),
        Option("--json", "Print one JSON object.", bool, False),
    ),
    (
        "data.source",
        "data.max_length",
        "data.limit_train",
        "model.name",
        "batch",
        "optim.epochs",
        "optim.max_steps",
        "run.seed",
    ),
)


def run(world: World, loaded: Loaded) -> None:
    """Open or build the token cache and show the forecast, on rank 0 only."""
    config, as_json = loaded.config, loaded.options["json"]
    num_ranks = world.num_ranks if loaded.options["ranks"] is None else loaded.options["ranks"]
    if not world.is_main:
        return
    # Imported here, so that --help and wrong settings do not wait seconds for torch.
    with importing():
        from agnews_dist.data.batching.forecast import forecast, warn_of_idle_ranks
        from agnews_dist.data.batching.shares import quadratic_weight
        from agnews_dist.events import Warned, begin_phase
        from agnews_dist.report.console import create_console
        from agnews_dist.report.formatting import create_output
        from agnews_dist.report.plan_view import show_plan
        from agnews_dist.report.result_files import print_json
        from agnews_dist.run.hub_inputs import fetch_inputs, list_requests
        from agnews_dist.run.model_setup import read_model_files
        from agnews_dist.run.setup import estimate_epochs, load_text, open_tokens, plan_settings

    data, model, batch = config.data, config.model, config.batch
    settings = plan_settings(batch, config.run.seed)
    out = create_output(sys.stderr if as_json else sys.stdout)
    with closing(create_console(out)) as emit:
        fetch_inputs(partial(list_requests, config, has_weights=False), World(), emit)
        files = read_model_files(model, data)
        emit(begin_phase(f"load {data.source}"))
        corpus = load_text(data)
        store = open_tokens(corpus, files.tokenizer, data, max_length=data.max_length, emit=emit, world=world)
        split = store.splits["train"]
        num_epochs = estimate_epochs(config, split.lengths)
        estimate = forecast(
            split.lengths,
            settings,
            num_epochs=num_epochs,
            max_steps=config.optim.max_steps,
            num_ranks=num_ranks,
            max_tokens_per_rank=batch.max_tokens_per_rank,
            quadratic=quadratic_weight(files.config.n_embd),
            max_length=data.max_length,
        )
        emit.close()
        if as_json:
            fields = {**estimate.to_dict(), "num_truncated": split.num_truncated, "max_length": data.max_length}
            print_json(fields)
        else:
            show_plan(
                estimate,
                title=f"{model.name} on {data.source}, ranks: {num_ranks}, epochs: {num_epochs:,}",
                data_facts=corpus.facts,
                num_truncated=split.num_truncated,
                max_length=data.max_length,
                out=out,
            )
        balance = estimate.efficiency.rank_balance
        warning = warn_of_idle_ranks(settings, num_examples=len(split), num_ranks=num_ranks, rank_balance=balance)
        if warning:
            emit(Warned(message=warning))
