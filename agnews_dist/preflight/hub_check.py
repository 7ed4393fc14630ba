"""Check that model and data are in the local Hugging Face cache, or that the hub answers."""

import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path

from agnews_dist.data.corpus import SYNTHETIC
from agnews_dist.data.local_files import is_local_path
from agnews_dist.errors import ModelError
from agnews_dist.model.pretrained import CONFIG_FILE, EMBEDDED, TOKENIZER_FILES, WEIGHT_FILES, locate
from agnews_dist.preflight.findings import Finding, run_with_timeout

HUB_SECONDS = 5.0


def check_hub(model: str, revision: str | None, init: str, source: str) -> Finding:
    """Check that the run can get its model and data. If the hub does not answer, put this process into offline mode."""
    cached: dict[str, bool] = {}
    if _is_hub_model(model):
        cached[model] = _has_model(model, revision, init)
    if source != SYNTHETIC and not Path(source).expanduser().exists() and not is_local_path(source):
        cached[source] = _has_data(source)
    if not cached:
        return Finding(check="hub", verdict="ok", found="not needed: model and data are local")
    return _judge_hub(cached)


def _judge_hub(cached: Mapping[str, bool]) -> Finding:
    """Check the hub for hub ids; `cached`: whether each is complete in the local cache."""
    from huggingface_hub import constants

    missing = [name for name, is_cached in cached.items() if not is_cached]
    complete = f"all is below {constants.HF_HOME}"
    incomplete = f"{', '.join(missing)}: not complete below {constants.HF_HOME}"
    prepare = "Run python -m agnews_dist prepare where there is a network, with the same HF_HOME; or set local paths"
    if constants.HF_HUB_OFFLINE:
        if missing:
            return Finding(check="hub", verdict="fail", found=f"{incomplete}, and HF_HUB_OFFLINE is set", remedy=prepare)
        return Finding(check="hub", verdict="ok", found=f"{complete}; offline mode (HF_HUB_OFFLINE)")
    # Twice: resolving the host name has no time limit of its own.
    reason = run_with_timeout(2 * HUB_SECONDS, lambda: _send_request(constants.ENDPOINT)).error
    if reason is None:
        found = f"{', '.join(missing)} will be downloaded" if missing else complete
        return Finding(check="hub", verdict="ok", found=f"{found}; {constants.ENDPOINT} answers")
    constants.HF_HUB_OFFLINE = True
    unreachable = f"{constants.ENDPOINT} cannot be reached ({reason})"
    if missing:
        return Finding(check="hub", verdict="fail", found=f"{incomplete}, and {unreachable}", remedy=prepare)
    remedy = "Set HF_HUB_OFFLINE=1 (under Slurm OFFLINE=1 in slurm/site.env): else every start waits for the hub"
    return Finding(check="hub", verdict="warn", found=f"{unreachable}; {complete}", remedy=remedy)


def _is_hub_model(name: str) -> bool:
    try:
        return name != EMBEDDED and locate(name, None).directory is None
    except ModelError:
        return False  # a wrong path: reported when the model is read


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
    return any(built.glob("*/*/*"))


def _send_request(url: str) -> None:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=HUB_SECONDS):
            pass
    except urllib.error.HTTPError:
        pass  # an error status is an answer
    except urllib.error.URLError as error:
        raise OSError(str(error.reason)) from error
