"""The Hugging Face Hub through its own client: opens a repository, uploads a directory, brings a bundle here.

The client finds the token itself, in HF_TOKEN or where `hf auth login` left it. Here nothing is told what it is, and
what the client says is passed on without anything that might be secret.
"""

import json
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from lora_dist import hub_client
from lora_dist.errors import UserError

T = TypeVar("T")

LOG_IN = "log in by `hf auth login`, or set HF_TOKEN to a token that may write (https://huggingface.co/settings/tokens)"
PASSING = (408, 409, 412, 425, 429)
"""Client errors that go away: a time-out, a commit made meanwhile, too many requests."""
NEEDED = ["*.json", "*.safetensors", "*.py", "README.md"]
"""What a bundle or a model may consist of."""
OLD_WEIGHTS = ["adapter_model.bin", "pytorch_model*.bin"]
"""Fetched only where there are no safetensors: a repository that has both has the same in them."""

_NAME = re.compile(r"([A-Za-z0-9_][\w.-]*/[\w.-]+)(?:@(\S+))?")


class HubError(Exception):
    """Something failed between here and the Hub.

    Attributes:
        passing: whether it may go away by itself.
    """

    def __init__(self, message: str, passing: bool) -> None:
        """
        Args:
            message: without secrets.
            passing: whether it may go away by itself.
        """
        super().__init__(message)
        self.passing = passing


def require_login() -> None:
    """Raises a `HubError` where it is plain that nothing can be written."""
    from huggingface_hub import get_token, is_offline_mode

    if is_offline_mode():
        raise HubError("HF_HUB_OFFLINE is set; unset it", passing=False)
    try:
        token = get_token()
    except OSError as error:
        raise HubError(f"the token cannot be read: {error}; {LOG_IN}", passing=False) from error
    if token is None:
        raise HubError(f"there is no token: {LOG_IN}", passing=False)


def open_repository(name: str, private: bool) -> str:
    """Makes sure that a repository for a model exists, and returns its whole name.

    Args:
        name: with or without a namespace; without, it is in the user's own.
        private: if it has to be made; otherwise what the namespace has as its default.

    Raises:
        HubError: it cannot be written to, or not now.
    """
    from huggingface_hub import HfApi

    require_login()
    hub_client.set_up()
    return _translated(lambda: HfApi().create_repo(name, private=private or None, exist_ok=True).repo_id)


def upload(repository: str, directory: Path, message: str) -> None:
    """Makes one commit of the files in a directory; a file that has not changed is not sent again.

    Raises:
        HubError: nothing was committed, as far as is known.
    """
    from huggingface_hub import HfApi

    hub_client.set_up()
    _translated(lambda: HfApi().upload_folder(repo_id=repository, folder_path=directory, commit_message=message))


def local_directory(name: str) -> Path:
    """The directory of a bundle or model: `name` itself, or a copy of what the Hub has as `org/name[@revision]`.

    Raises:
        UserError: there is no such directory, and it cannot be had from the Hub.
    """
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    match = _NAME.fullmatch(name)
    try:
        if Path(name).is_dir() or not match:
            return Path(name)
    except OSError as error:
        raise UserError(f"{name}: {error.strerror}; name a directory, or what the Hub has") from error
    repository, revision = match.groups()
    missing = f"no such directory: {name}; and from the Hub it cannot be had:"
    try:
        with hub_client.reading(f"{name}, a model or adapter", f"`hf download {repository}`"):
            directory = _fetch(repository, revision, NEEDED)
            if not any(directory.glob("*.safetensors")):
                # A snapshot is called after its commit.
                directory = _fetch(repository, directory.name, OLD_WEIGHTS)
            return directory
    except UserError:
        raise
    except GatedRepoError as error:
        raise UserError(
            f"{missing} {repository} is gated. Ask for access on its page there, then `hf auth login` or set HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(f"{missing} {repository} has no branch, tag or commit {revision}") from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{missing} there is no repository {repository}, or it is private: `hf auth login` or set HF_TOKEN"
        ) from error
    except Exception as error:  # the client passes on those of three libraries below it
        raise UserError(
            f"{missing} {_without_secrets(error)}\nWhere there is no network, bring it here before, by "
            f"`hf download {repository}`."
        ) from error


def _fetch(repository: str, revision: str | None, patterns: list[str]) -> Path:
    """Brings files at the top of a repository here: what lies deeper are checkpoints, if anything."""
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns, ignore_patterns="*/*"))


def _translated(call: Callable[[], T]) -> T:
    """Calls the client; whatever it raises becomes a `HubError`."""
    try:
        return call()
    except Exception as error:  # the client passes on those of three libraries below it
        raise HubError(_without_secrets(error), _is_passing(error)) from error


def _is_passing(error: BaseException | None) -> bool:
    """Whether a second try may do better, as said by the first answer of the Hub in the chain of causes."""
    from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled

    cause = error
    while cause is not None:
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if status is not None:
            return status in PASSING or status >= 500
        if isinstance(cause, LocalTokenNotFoundError | OfflineModeIsEnabled):
            return False
        cause = cause.__cause__
    # Of a name or a card that is not valid. A page of HTML in place of JSON comes from a proxy, or a Hub in need.
    return isinstance(error, json.JSONDecodeError) or not isinstance(error, ValueError)


def _without_secrets(error: BaseException) -> str:
    """What an error says, on a line, without tokens and without the signatures in addresses for uploads."""
    from huggingface_hub import get_token

    # The client says which file it was uploading, and leaves what went wrong to the cause of that.
    causes = [error, error.__cause__] if type(error) is RuntimeError else [error]
    text = ": ".join(" ".join(str(cause).split()) for cause in causes) or type(error).__name__
    # Where it cannot be read, it is in no message either.
    with suppress(OSError):
        text = text.replace(get_token() or "…", "…")
    text = re.sub(r"\bhf_\w+", "hf_…", text)
    return re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]*", r"\1", text)
