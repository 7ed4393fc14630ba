"""Check that model and data are in the local Hugging Face cache, or that the hub answers: by the rules of the run itself."""

from collections.abc import Callable, Sequence

from agnews_dist.data.hub_cache import cache_directory
from agnews_dist.data.hub_files import Fetched, Request, fetch, share_directories
from agnews_dist.data.hub_requests import endpoint, is_offline
from agnews_dist.distributed import collectives
from agnews_dist.distributed.world import World
from agnews_dist.errors import UserError
from agnews_dist.preflight.findings import Finding

REMEDY = "Set HF_HUB_OFFLINE=1 (under Slurm OFFLINE=1 in slurm/site.env): else every start waits for the hub"
ListRequests = Callable[[], Sequence[Request]]


def check_hub_on_node(list_requests: ListRequests, list_config_requests: ListRequests, world: World) -> list[Finding]:
    """Check the hub on the first rank of each node, for all ranks of the node. Collective."""
    finding, fetched = None, None
    requests = collectives.catch(list_requests)
    # A wrong path is a finding of another check.
    if world.local_rank == 0 and not isinstance(requests, UserError):
        finding, fetched = check_hub(requests, list_config_requests())
    # Without a process group each rank is alone.
    share_directories(collectives.all_gather(fetched), world if collectives.is_distributed() else World())
    return [finding] if finding is not None else []


def check_hub(requests: Sequence[Request], config_requests: Sequence[Request]) -> tuple[Finding, Fetched]:
    """Check that the run can get what it `requests`; `config_requests`: for the small files that the other checks read."""
    if not requests:
        return Finding("hub", "ok", "not needed: model and data are local"), Fetched()
    try:
        fetched = fetch(requests, download=False)
        if fetched.pending:
            small = fetch(config_requests)
            found = f"{', '.join(fetched.pending)} will be downloaded; {endpoint()} answers"
            return Finding("hub", "ok", found), Fetched({**fetched.directories, **small.directories})
    except UserError as error:
        return Finding("hub", "fail", str(error)), Fetched()
    if fetched.warning:
        return Finding("hub", "warn", fetched.warning.rstrip("."), REMEDY), fetched
    return Finding("hub", "ok", f"all is in {cache_directory()}" + "; offline mode (HF_HUB_OFFLINE)" * is_offline()), fetched
