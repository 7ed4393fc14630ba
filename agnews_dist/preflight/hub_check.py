"""Check that model and data are in the local Hugging Face cache, or that the hub answers."""

import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path

from agnews_dist.data.corpus import SYNTHETIC
from agnews_dist.data.local_files import exists, is_local_path
from agnews_dist.errors import ModelError
from agnews_dist.model.pretrained import CONFIG_FILE, EMBEDDED, TOKENIZER_FILES, WEIGHT_FILES, locate
from agnews_dist.preflight.findings import Finding, run_with_timeout

HUB_SECONDS = 5.0


def check_hub(model: str, revision: str | None, init: str, source: str) -> Finding:
    """Check that the run can get its model and data. If the hub does not answer, put this process into offline mode."""
    cached: dict[str, bool] = {}  # hub id -> whether it is complete in the local cache
    with suppress(ModelError):  # a wrong path: reported when the model is read
        if model != EMBEDDED and locate(model, revision).directory is None:
            cached[model] = _has_model(model, revision, init)
    if source != SYNTHETIC and not exists(Path(source)) and not is_local_path(source):
        cached[source] = _has_data(source)
    if not cached:
        return Finding("hub", "ok", "not needed: model and data are local")
    from huggingface_hub import constants

    missing = ", ".join(name for name, is_cached in cached.items() if not is_cached)
    complete = f"all is below {constants.HF_HOME}"
    if constants.HF_HUB_OFFLINE:
        reason = "HF_HUB_OFFLINE is set"
        if not missing:
            return Finding("hub", "ok", f"{complete}; offline mode (HF_HUB_OFFLINE)")
    else:
        # Twice: resolving the host name has no time limit of its own.
        _, error = run_with_timeout(2 * HUB_SECONDS, lambda: _send_request(constants.ENDPOINT))
        if error is None:
            found = f"{missing} will be downloaded" if missing else complete
            return Finding("hub", "ok", f"{found}; {constants.ENDPOINT} answers")
        constants.HF_HUB_OFFLINE = True
        reason = f"{constants.ENDPOINT} cannot be reached ({error})"
    if missing:
        remedy = "Run python -m agnews_dist prepare where there is a network, with the same HF_HOME; or set local paths"
        return Finding("hub", "fail", f"{missing}: not complete below {constants.HF_HOME}, and {reason}", remedy)
    remedy = "Set HF_HUB_OFFLINE=1 (under Slurm OFFLINE=1 in slurm/site.env): else every start waits for the hub"
    return Finding("hub", "warn", f"{reason}; {complete}", remedy)


def _has_model(name: str, revision: str | None, init: str) -> bool:
    """Return whether the files that a start reads are in the cache, at this revision."""
    from huggingface_hub import try_to_load_from_cache

    def has_any(*files: str) -> bool:
        return any(isinstance(try_to_load_from_cache(name, file, revision=revision), str) for file in files)

    return has_any(*TOKENIZER_FILES) and (init == "random" or (has_any(CONFIG_FILE) and has_any(*WEIGHT_FILES)))


def _has_data(source: str) -> bool:
    """Return whether `datasets` has built the data set before. Offline it reads only its own cache, not the hub's."""
    from datasets import config, naming

    *owner, name = source.split("/")
    built = Path(config.HF_DATASETS_CACHE) / "___".join([*owner, naming.camelcase_to_snakecase(name)])
    return exists(built) and any(built.glob("*/*/*"))


def _send_request(url: str) -> None:
    request = urllib.request.Request(url, method="HEAD")
    with suppress(urllib.error.HTTPError), urllib.request.urlopen(request, timeout=HUB_SECONDS):
        pass  # an error status is an answer, too
