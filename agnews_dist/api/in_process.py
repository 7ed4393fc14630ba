"""A training inside of a Python process: alone, or as one rank of a launcher's job. The process is left as it was."""

import gc
import os
import time
import traceback
from contextlib import ExitStack

from agnews_dist.api.training_run import Trained, TrainingJob, train
from agnews_dist.data.hub_requests import keep_hub_settings
from agnews_dist.distributed import collectives
from agnews_dist.distributed.interrupts import InterruptHandler
from agnews_dist.distributed.preemption import PreemptionHandler
from agnews_dist.distributed.world import World, check_interfaces, detect_world, is_launched
from agnews_dist.engine.process_state import keep_process_state
from agnews_dist.errors import SharedError, Stopped, UserError
from agnews_dist.storage.directories import provide_home


def train_here(job: TrainingJob) -> Trained:
    """Train in this process, as the rank that its launcher's variables give it. Collective.

    Returns:
        Directory and scores, on every rank.

    Raises:
        UserError: anything that the user can fix, as the class of the rank that had it.
        Stopped: the run was stopped before its end; its checkpoint is saved.
        KeyboardInterrupt: the same, after Ctrl-C.
    """
    has_launcher = is_launched(os.environ)
    preemption = PreemptionHandler(os.environ, begin_time=time.time()) if has_launcher else InterruptHandler()
    # A process group of the caller's is used, and stays open.
    owns_group = not collectives.is_distributed()
    with ExitStack() as stack:
        stack.enter_context(keep_process_state())
        stack.enter_context(keep_hub_settings())
        provide_home()
        world = detect_world(os.environ)
        check_interfaces(os.environ, world)
        preemption.start()
        stack.callback(preemption.close)
        if world.num_ranks == 1:
            stack.callback(collectives.close, destroys_group=owns_group)
        outcome = _train(world, job, preemption)
        # Here no traceback keeps the model alive: DDP's wrapper must be gone before its process group is.
        collectives.close(destroys_group=owns_group)
    # Model and feature files refer to each other in cycles: free them now, not at the program's next collection.
    gc.collect()
    if isinstance(outcome, BaseException):
        raise outcome
    if isinstance(preemption, InterruptHandler) and preemption.is_interrupted:
        raise KeyboardInterrupt(f"{outcome.directory} is finished")  # it came too late to stop the run
    return outcome


def _train(world: World, job: TrainingJob, preemption: PreemptionHandler) -> Trained | BaseException:
    """Return the result, or the error with which all ranks end together. Other errors are raised: other ranks may wait."""
    try:
        trained = train(world, job, preemption=preemption)
        return collectives.all_gather(trained)[0]
    except SharedError as error:
        return error.original
    except Stopped as stopped:
        is_interrupt = isinstance(preemption, InterruptHandler) and preemption.is_interrupted
        # All ranks raise it together, and rank 0 knows what is saved.
        return (KeyboardInterrupt if is_interrupt else Stopped)(collectives.all_gather(str(stopped))[0])
    except Exception as error:
        # The other ranks learn why this one ends. Collectives raise RuntimeError, perhaps because another rank failed first.
        last = str(error) if isinstance(error, UserError) else traceback.format_exception_only(error)[-1].strip()
        preemption.report_failure(last, is_own=not isinstance(error, RuntimeError))
        raise
