"""Faults in the n-th communication between ranks: functions for `ForkedJob(fault="support.collective_faults:inject")`.

Every call of torch.distributed that a training makes is counted on each rank: those of collectives.py and rendezvous.py, DDP's
own at its start, and the reduction of each bucket of gradients. COLLECTIVE_FAULT happens on rank ON_RANK at its call AT_CALL,
from 0. With CALLS=DIR every rank writes the names of its calls to a file, one a line. Values of COLLECTIVE_FAULT:

    raise   the call raises RuntimeError, as torch does if a connection breaks
    hang    it never returns
    late    it begins only after LATE seconds, more than the others' time limit
    flip    it returns with one bit flipped, which BIT (a seed) chooses
"""

import functools
import importlib
import os
import random
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FAULTS = ("raise", "hang", "late", "flip")
NO_DATA = ("rendezvous", "init_process_group", "TCPStore", "_verify_param_shape_across_processes", "wait_for_main")
"""Calls that return nothing in which a bit could flip."""
_calls: list[str] = []


def inject() -> None:
    """Wrap the calls."""
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    from agnews_dist.distributed import collectives, rendezvous

    ddp = importlib.import_module("torch.nn.parallel.distributed")
    all_reduce = dist.all_reduce
    for name in ("rendezvous", "init_process_group", "TCPStore", "all_gather", "broadcast"):
        _wrap(dist, name)
    _wrap(rendezvous, "_share_prefix")
    _wrap(collectives, "wait_for_main")
    for name in ("_verify_param_shape_across_processes", "_sync_module_states"):
        _wrap(ddp, name)
    construct = DistributedDataParallel.__init__

    def construct_with_hook(self: Any, *arguments: Any, **options: Any) -> None:
        construct(self, *arguments, **options)
        self.register_comm_hook(None, reduce_bucket)

    def reduce_bucket(_: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        name = f"gradients of bucket {bucket.index()}"
        fault = _begin(name)
        # As DDP does without a hook.
        work = all_reduce(bucket.buffer().div_(dist.get_world_size()), async_op=True)
        return work.get_future().then(lambda future: _flip([future.value()[0]])[0] if fault == "flip" else future.value()[0])

    DistributedDataParallel.__init__ = construct_with_hook


def _wrap(module: Any, name: str) -> None:
    call = getattr(module, name)

    @functools.wraps(call, updated=())
    def wrapped(*arguments: Any, **options: Any) -> Any:
        fault = _begin(name)
        result = call(*arguments, **options)
        return _flip_result(name, arguments, result) if fault == "flip" else result

    setattr(module, name, wrapped)


def _begin(name: str) -> str:
    """Count a call; cause its fault, or return it if it changes the result."""
    number = len(_calls)
    _calls.append(f"{name} of {_caller()}")
    if "CALLS" in os.environ:
        with Path(os.environ["CALLS"], f"rank{os.environ['RANK']}").open("a") as file:
            file.write(_calls[-1] + "\n")
    fault = os.environ.get("COLLECTIVE_FAULT", "")
    if not fault or os.environ["ON_RANK"] != os.environ["RANK"] or int(os.environ["AT_CALL"]) != number:
        return ""
    print(f"fault: {fault} in {_calls[-1]}", file=sys.stderr, flush=True)
    if fault == "raise":
        raise RuntimeError("injected: connection reset by peer")
    if fault == "hang":
        threading.Event().wait()
    if fault == "late":
        time.sleep(float(os.environ["LATE"]))
    return fault


def _caller() -> str:
    """Return the function of the package that communicates: the innermost one outside of collectives.py."""
    frame = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.startswith("agnews_dist.") and not module.endswith(".collectives"):
            return f"{module.removeprefix('agnews_dist.')}.{frame.f_code.co_name}"
        frame = frame.f_back
    return "autograd"


def _flip_result(name: str, arguments: Sequence[Any], result: Any) -> Any:
    if name == "_share_prefix":
        letters = [*result]
        position = _random().randrange(len(letters))
        letters[position] = chr(ord(letters[position]) ^ 1 << _random().randrange(7))
        return "".join(letters)
    if name == "_sync_module_states":
        _flip([parameter.data for parameter in arguments[0].parameters()])
    elif name not in NO_DATA:
        # The received tensors are the first argument.
        _flip(arguments[0] if isinstance(arguments[0], list) else [arguments[0]])
    return result


def _flip(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Flip one bit in one of the tensors, in place."""
    contents = [tensor.detach().view(-1).view(torch.uint8) for tensor in tensors]
    position = _random().randrange(sum(map(len, contents)))
    for content in contents:
        if position < len(content):
            content[position] ^= 1 << _random().randrange(8)
            break
        position -= len(content)
    return tensors


@functools.cache
def _random() -> random.Random:
    return random.Random(os.environ.get("BIT", "0"))
