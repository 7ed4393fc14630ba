"""Check that model and data are in the local Hugging Face cache, or that the hub answers: by the rules of the run itself."""

from collections.abc import Sequence

from agnews_dist.data.hub_cache import cache_directory
from agnews_dist.data.hub_files import Fetched, HubError, Request, fetch
from agnews_dist.data.hub_requests import endpoint, is_offline
from agnews_dist.errors import UserError
from agnews_dist.preflight.findings import Finding

REMEDY = "Set HF_HUB_OFFLINE=1 (under Slurm OFFLINE=1 in slurm/site.env): else every start waits for the hub"


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
    except HubError as error:
        return Finding("hub", "fail", error.found, error.remedy), Fetched()
    except UserError as error:
        return Finding("hub", "fail", str(error)), Fetched()
    if fetched.warning:
        return Finding("hub", "warn", fetched.warning.rstrip("."), REMEDY), fetched
    return Finding("hub", "ok", f"all is in {cache_directory()}" + "; offline mode (HF_HUB_OFFLINE)" * is_offline()), fetched
