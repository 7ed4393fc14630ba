"""Is what the hub has to give here, or can the hub be reached? Looked at first: what asks it later may wait for minutes."""

import urllib.error
import urllib.request
from functools import partial
from pathlib import Path

from agnews_dist.config.schema import Config
from agnews_dist.data.corpus import SYNTHETIC
from agnews_dist.data.local_files import looks_local
from agnews_dist.errors import ModelError
from agnews_dist.model.pretrained import EMBEDDED, locate
from agnews_dist.preflight.findings import Finding, within

HUB_SECONDS = 5.0
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
TOKENIZER = ("tokenizer.json", "vocab.json")


def find_hub(config: Config) -> Finding:
    """Whether the run can have its model and data. Where the hub does not answer, nothing in this process asks it again."""
    name, source = config.model.name, config.data.source
    wanted = {name: partial(_has_model, config)} if _is_id_of_model(name) else {}
    if source != SYNTHETIC and not Path(source).expanduser().exists() and not looks_local(source):
        wanted[source] = partial(_has_data, source)
    absent = [one for one, is_here in wanted.items() if not is_here()]
    if not wanted:
        return Finding(check="hub", verdict="ok", found="not needed: model and data are local")
    from huggingface_hub import constants

    cached, missing = f"all is below {constants.HF_HOME}", f"{', '.join(absent)}: not whole below {constants.HF_HOME}"
    prepare = "Run python -m agnews_dist prepare where there is a network, with the same HF_HOME; or set local paths"
    if constants.HF_HUB_OFFLINE:
        if absent:
            return Finding(check="hub", verdict="fail", found=f"{missing}, and HF_HUB_OFFLINE is set", remedy=prepare)
        return Finding(check="hub", verdict="ok", found=f"{cached}, and it is not asked (HF_HUB_OFFLINE)")
    # A name server's time is not the connection's.
    reason = within(2 * HUB_SECONDS, lambda: _ask(constants.ENDPOINT)).error
    if reason is None:
        what = f"{', '.join(absent)} will be downloaded" if absent else cached
        return Finding(check="hub", verdict="ok", found=f"{what}; {constants.ENDPOINT} answers")
    constants.HF_HUB_OFFLINE = True
    silent = f"{constants.ENDPOINT} cannot be reached ({reason})"
    if absent:
        return Finding(check="hub", verdict="fail", found=f"{missing}, and {silent}", remedy=prepare)
    remedy = "Set HF_HUB_OFFLINE=1 (under Slurm OFFLINE=1 in slurm/site.env): else every start waits for it first"
    return Finding(check="hub", verdict="warn", found=f"{silent}; {cached}", remedy=remedy)


def _is_id_of_model(name: str) -> bool:
    try:
        return name != EMBEDDED and locate(name, None).directory is None
    except ModelError:
        return False  # a wrong path, told where the model is read


def _has_model(config: Config) -> bool:
    """Whether the files that a start reads are in the cache, at the wanted revision."""
    from huggingface_hub import try_to_load_from_cache

    def has(*names: str) -> bool:
        revision = config.model.revision
        found = (try_to_load_from_cache(config.model.name, name, revision=revision) for name in names)
        return any(isinstance(path, str) for path in found)

    return has(*TOKENIZER) and (config.model.init == "random" or (has("config.json") and has(*WEIGHTS)))


def _has_data(source: str) -> bool:
    """Whether `datasets` has made it up once: offline it takes that, whatever the hub's own cache holds."""
    from datasets import config, naming

    *owner, name = source.split("/")
    made = Path(config.HF_DATASETS_CACHE) / "___".join([*owner, naming.camelcase_to_snakecase(name)])
    return any(made.glob("*/*/*"))


def _ask(url: str) -> None:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=HUB_SECONDS):
            pass
    except urllib.error.HTTPError:
        pass  # it answers
    except urllib.error.URLError as error:
        raise OSError(str(error.reason)) from error
