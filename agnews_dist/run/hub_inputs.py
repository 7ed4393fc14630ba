"""The files of a run that come from the Hugging Face hub: fetched once per node, for all of its ranks."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from threading import Thread

from agnews_dist.config.schema import Config, DataConfig
from agnews_dist.data.corpus import is_hub_id
from agnews_dist.data.hub import request_data
from agnews_dist.data.hub_files import Fetched, Request, fetch, share_directories
from agnews_dist.data.local_files import SplitSettings
from agnews_dist.distributed import collectives
from agnews_dist.distributed.world import World, print_line
from agnews_dist.errors import UserError
from agnews_dist.events import Emit, Warned, begin_phase
from agnews_dist.model.pretrained import EMBEDDED, find_model_directory, request_model

_POLL_SECONDS = 0.05


def split_settings(data: DataConfig, *, hold_out: bool) -> SplitSettings:
    """Return which parts of the data are which split. `hold_out`: for a training (see `setup.load_text`)."""
    names = {"train": data.splits.train, "validation": data.splits.validation, "test": data.splits.test}
    return SplitSettings(data.subset, names, unnamed="train" if hold_out else "test")


def list_requests(config: Config, *, has_weights: bool = True, has_data: bool = True, hold_out: bool = True) -> list[Request]:
    """Return the requests for what a run reads from the hub; `has_`: the parts that it reads.

    Raises:
        UserError: a name reads like a path that does not exist.
    """
    model, data, requests = config.model, config.data, list[Request]()
    if has_data and is_hub_id(data.source):
        requests.append(request_data(data.source, data.revision, split_settings(data, hold_out=hold_out)))
    if model.name != EMBEDDED and find_model_directory(model.name) is None:
        needs_weights = has_weights and model.init == "pretrained"
        requests.insert(0, request_model(model.name, model.revision, needs_weights=needs_weights))
    return requests


def fetch_inputs(find_requests: Callable[[], Sequence[Request]], world: World, emit: Emit) -> None:
    """Fetch on the first rank of every node; the other ranks of the node use the same directories. Collective.

    From here on no library of any rank sends requests to the hub. `emit` gets one warning if copies in the cache are used that
    the hub did not confirm.

    Raises:
        SharedError: on all ranks, if a node lacks files; it has the message of the lowest such rank.
    """
    requests = collectives.catch(find_requests)
    notices, announced = [""], ""
    job = _start(requests, notices) if world.local_rank == 0 and not isinstance(requests, UserError) else None
    if world.is_main and job is not None and requests:
        emit(begin_phase("fetch files of the hub"))
    while True:
        # A download takes as long as it needs, so the ranks poll instead of waiting in a collective with a time limit.
        states = collectives.all_gather((job is not None and not job.done(), notices[-1]))
        notice = next((f"{world.prefix_of(rank)}{text}" for rank, (_, text) in enumerate(states) if text), "")
        if world.is_main and notice != announced:
            announced = notice
            print_line(notice)
        if not any(is_running for is_running, _ in states):
            break
        time.sleep(_POLL_SECONDS)
    outcome = job.result() if job is not None else requests if isinstance(requests, UserError) else None
    fetched = collectives.all_gather(collectives.raise_if_any_failed(outcome))
    share_directories(fetched, world)
    warnings = dict.fromkeys(each.warning for each in fetched if each is not None and each.warning)
    if world.is_main and warnings:
        emit(Warned(message=" ".join(warnings)))


def _start(requests: Sequence[Request], notices: list[str]) -> Future[Fetched | UserError]:
    """Fetch in a thread, so that its rank can take part in collectives meanwhile. `notices` gets lines about waits."""
    job: Future[Fetched | UserError] = Future()

    def work() -> None:
        try:
            job.set_result(collectives.catch(lambda: fetch(requests, notify=notices.append)))
        except BaseException as error:  # a bug: raised in the main thread
            job.set_exception(error)

    Thread(target=work, name="hub inputs", daemon=True).start()
    return job
