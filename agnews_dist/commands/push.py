"""`agnews-dist push`: upload the exported model of a run to the Hugging Face hub, and nothing else of the run."""

import os
from collections.abc import Sequence
from pathlib import Path

from agnews_dist.commands.arguments import Command, Loaded, Option
from agnews_dist.commands.command import importing
from agnews_dist.config.schema import PathText
from agnews_dist.distributed.world import World
from agnews_dist.errors import ConfigError, UserError

COMMAND = Command(
    "push",
    "Upload the model of a run to the Hugging Face hub. The repository is created if it does not exist.",
    (
        "agnews-dist push runs/NAME owner/news",
        "agnews-dist push runs/NAME owner/news --private",
        "agnews-dist push runs/NAME owner/news --revision v2",
    ),
    (
        Option("what", "RUN and REPO: a run's directory, a hub id.", PathText, nargs="*"),
        Option("--private", "Create the repository as private.", bool, False),
        Option("--revision", "Branch; default: main."),
    ),
    settings=(),
)


def run(world: World, loaded: Loaded) -> None:
    """Send the files of the model to the hub in one commit, on rank 0."""
    what: Sequence[str] = loaded.options["what"]
    if len(what) != 2:
        raise ConfigError(f"push with {len(what)} arguments: it takes two. Write agnews-dist push RUN OWNER/NAME.")
    if not world.is_main:
        return
    # Imported here, so that --help does not wait for them.
    with importing():
        from huggingface_hub import get_token

        from agnews_dist.model.export import find_export

    directory = find_export(what[0])
    if get_token() is None:
        raise UserError(f"push {what[1]}: the hub needs a token. Set HF_TOKEN, or log in with 'hf auth login'.")
    print(_upload(directory, what[1], private=loaded.options["private"], revision=loaded.options["revision"] or None))


def _upload(directory: Path, repository: str, *, private: bool, revision: str | None) -> str:
    """Send a model; return the address of the commit."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    from agnews_dist.data.hugging_face import translate_errors
    from agnews_dist.model.export import EXPORT_FILES, MODELING_FILE

    def make_error(reason: str) -> UserError:
        return UserError(f"push {repository}: {reason}. Check the network, HF_ENDPOINT and HF_HUB_OFFLINE.")

    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    with translate_errors(make_error):
        try:
            created = api.create_repo(repository, private=private, exist_ok=True)
            if revision is not None:
                api.create_branch(created.repo_id, branch=revision, exist_ok=True)
            done = api.upload_folder(
                repo_id=created.repo_id,
                folder_path=directory,
                allow_patterns=[*EXPORT_FILES, MODELING_FILE],
                revision=revision,
                commit_message="Upload a model of agnews_dist",
            )
        except HFValidationError as error:
            raise ConfigError(f"push {repository}: it is not a hub id. Write OWNER/NAME.") from error
        except HfHubHTTPError as error:
            status = error.response.status_code
            answer = f"the hub answers {status} ({error.server_message or 'without a reason'})"
            reason, fix = _REASONS.get(status, (answer, "Correct that, or try again later"))
            raise UserError(f"push {repository}: {reason}. {fix}.") from error
    return f"{directory} uploaded: {done.commit_url}"


_REASONS = {
    401: ("the hub does not know the token", "Set another HF_TOKEN, or log in with 'hf auth login'"),
    403: ("the token may not write there", "Use a token with write access, or another owner"),
    404: ("the hub has no such owner or repository", "Check its name"),
}
"""Status of an answer -> (reason, what to do)."""
