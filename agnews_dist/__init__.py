"""Distributed fine-tuning of a partially frozen GPT-2 into a classifier of AG News.

The package is one journey, and each module is one station of it:

    text -> tokens -> plan -> batch -> frozen prefix -> trainable suffix -> loss -> evaluation -> report

    text            data/corpus.py    rows of the hub (hub.py), local files (files.py, formats.py) or synthetic.py
                    data/checks.py    bad rows become errors that name file and row; splits.py holds out and limits
    tokens          data/tokens.py    one flat token array per split, cached under a content fingerprint (token_files.py,
                                      token_shelf.py)
    plan            data/batching.py  pure numpy: which examples form each global batch of an epoch (of plan_settings.py)
                    data/sharing.py   how the ranks split one; position.py: where in a plan a run stands
                    data/forecast.py  what a plan will cost; sampler.py: the plan for anybody's DataLoader
    batch           data/loader.py    a rank's share as padded arrays on the device (legend: batch.py)
    frozen prefix   model/prefix.py   everything below the freeze boundary: no autograd, eval mode; packed.py runs its blocks
                                      without padding, side_by_side.py several calls at once, in the order of data/calls.py
                    features/         its output, kept between epochs and runs: cache.py decides with choice.py and room.py,
                                      compute.py fills memory or files.py, keys.py names what is on disk, shelf.py limits it,
                                      source.py hands out a batch's features
    suffix          model/suffix.py   the trainable blocks, the final norm, `out_head`; last_token.py: the last block for the
                                      last real token only; dropout.py: masks of seed, step and example
                    model/gpt2.py     where both come from: load, add [PAD], freeze, split
                    model/embedded.py tokenizer and model made on the spot: no file, no network
    loss            step.py           sum of losses over the global count, voted on, clipped, applied
                    wrapped.py        what trains as its engine runs it, made by engine.py: DDP; zero.py for DeepSpeed (with
                                      the dictionary of zero_settings.py), sharded.py for FSDP2, each its only door
                    optim.py          AdamW groups; the learning rate as a function of the step
                    training.py       the loop around it: steps, evaluations, checkpoints, stops
    evaluation      scoring.py        fixed micro-batches dealt to ranks, every example exactly once
                    metrics.py        confusion matrix -> accuracy, macro F1, loss
    report          events.py         everything a run says; report/ turns it into console, log, card
                    model/export.py   a directory that Hugging Face loads
                    opening.py        what a run says before its first step
                    outcome.py        totals, best epoch, the files of the run's directory (rundir.py)

    never lost      checkpoint.py     a checkpoint on disk, whole or not at all; saving.py: when, and beside training
                    resume.py         where a run goes on, and what forbids it; fingerprints.py: what the weights depend on
                    attempt.py        one start of a run: claims it, finds its checkpoint, leaves status.json (status.py)
                    preempt.py        signals, time limits, vanished launchers and dead ranks: known to all ranks (peers.py,
                                      beats.py); rendezvous.py: how the ranks of one attempt find each other
    clusters        node.py           a node's ranks, threads and cores, for launch/
                    restarts.py       shall a job start again, for slurm/
                    preflight/        what doctor.py looks at: meeting.py before torch is loaded, machine.py and disks.py on
                                      every rank, together.py (ranks.py, network.py) between them, duration.py the job's time
                    node_cache.py     where a node keeps its own copies: data/node_copy.py, features/node_file.py

The ground under it: errors.py (what a user can mend), config.py, settings.py, config_file.py and cli.py (what a user can
set), world.py (which rank am I), device.py (what it may run on), batch.py (shape letters), collectives.py (sums, gathers,
votes: the only door to torch.distributed), engine.py (the only door to accelerate), memory.py (what a rank will need),
clock.py, profiling.py, debug.py, rehearsal.py. The stories, each a straight line inside story.py's frame: train.py,
evaluate.py, predict.py, prepare.py, plan.py, doctor.py, cache.py; sources.py loads what they start from, and
training_options.py is what they are told besides the configuration.

Importing this package loads nothing heavy.
"""

__version__ = "0.1.0"
