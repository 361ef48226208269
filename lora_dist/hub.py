"""The Hugging Face Hub: creates a repository, uploads a directory, downloads an adapter or model.

`huggingface_hub` reads the token itself, from HF_TOKEN or from `hf auth login`. Secrets are removed from its
error messages.
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

LOG_IN = (
    "run `hf auth login`, or set HF_TOKEN to a token with write permission (https://huggingface.co/settings/tokens)"
)
TEMPORARY_STATUS = (408, 409, 412, 425, 429)
"""Status codes of client errors that a retry may resolve: timeout, concurrent commit, too many requests."""
PATTERNS = ["*.json", "*.safetensors", "*.py", "README.md"]
"""Files of an adapter or model."""
PICKLED_WEIGHTS = ["adapter_model.bin", "pytorch_model*.bin"]
"""Downloaded only from repositories without safetensors."""

_NAME = re.compile(r"([A-Za-z0-9_][\w.-]*/[\w.-]+)(?:@(\S+))?")


class HubError(Exception):
    """A request to the Hub failed. The message contains no secrets.

    Attributes:
        temporary: Whether a retry may succeed.
    """

    def __init__(self, message: str, temporary: bool) -> None:
        super().__init__(message)
        self.temporary = temporary


def require_login() -> None:
    """Raises a `HubError` if the client is offline or has no token."""
    from huggingface_hub import get_token, is_offline_mode

    if is_offline_mode():
        raise HubError("HF_HUB_OFFLINE is set; unset it to use the Hub", temporary=False)
    try:
        token = get_token()
    except OSError as error:
        raise HubError(f"cannot read the token: {error}; {LOG_IN}", temporary=False) from error
    if token is None:
        raise HubError(f"no token: {LOG_IN}", temporary=False)


def open_repository(name: str, private: bool) -> str:
    """Creates a model repository unless it exists, and returns its full name.

    Args:
        name: Without a namespace, it is created in the user's.
        private: Creates it as private; otherwise, the namespace's default applies.

    Raises:
        HubError: The repository cannot be created or written to.
    """
    from huggingface_hub import HfApi

    require_login()
    hub_client.set_up()
    return _translated(lambda: HfApi().create_repo(name, private=private or None, exist_ok=True).repo_id)


def upload(repository: str, directory: Path, message: str) -> None:
    """Commits the files of a directory; unchanged files are not sent again.

    Raises:
        HubError: The commit failed.
    """
    from huggingface_hub import HfApi

    hub_client.set_up()
    _translated(lambda: HfApi().upload_folder(repo_id=repository, folder_path=directory, commit_message=message))


def local_directory(name: str) -> Path:
    """Returns the directory of an adapter or model, downloaded if `name` is `org/name[@revision]` on the Hub.

    Raises:
        UserError: There is no such directory, and the download failed.
    """
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    match = _NAME.fullmatch(name)
    try:
        if Path(name).is_dir() or not match:
            return Path(name)
    except OSError as error:
        raise UserError(f"{name}: {error.strerror}; use a directory or a Hub name") from error
    repository, revision = match.groups()
    try:
        with hub_client.reading(f"the model or adapter {name}", f"`hf download {repository}`"):
            directory = _download(repository, revision, PATTERNS)
            if not any(directory.glob("*.safetensors")):
                # The name of a snapshot directory is its commit.
                directory = _download(repository, directory.name, PICKLED_WEIGHTS)
            return directory
    except UserError:
        raise
    except Exception as error:  # the client raises exceptions of three other libraries
        if isinstance(error, GatedRepoError):
            why = f"{repository} is gated. Request access on its page, then run `hf auth login` or set HF_TOKEN"
        elif isinstance(error, RevisionNotFoundError):
            why = f"{repository} has no branch, tag or commit {revision}"
        elif isinstance(error, RepositoryNotFoundError):
            why = f"there is no repository {repository}, or it is private: run `hf auth login` or set HF_TOKEN"
        else:
            why = f"{_without_secrets(error)}\nTo use it offline, download it first: `hf download {repository}`"
        raise UserError(f"no such directory: {name}, and it cannot be downloaded from the Hub: {why}") from error


def _download(repository: str, revision: str | None, patterns: list[str]) -> Path:
    """Downloads files from the top level of a repository; sub-folders may contain checkpoints."""
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns, ignore_patterns="*/*"))


def _translated(call: Callable[[], T]) -> T:
    """Turns exceptions of the client into `HubError`."""
    try:
        return call()
    except Exception as error:  # the client raises exceptions of three other libraries
        raise HubError(_without_secrets(error), _is_temporary(error)) from error


def _is_temporary(error: BaseException | None) -> bool:
    """Whether a retry may succeed, by the first HTTP response in the chain of causes."""
    from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled

    cause = error
    while cause is not None:
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if status is not None:
            return status in TEMPORARY_STATUS or status >= 500
        if isinstance(cause, LocalTokenNotFoundError | OfflineModeIsEnabled):
            return False
        cause = cause.__cause__
    # Invalid names and model cards raise ValueError. HTML instead of JSON comes from a proxy or an overloaded Hub.
    return isinstance(error, json.JSONDecodeError) or not isinstance(error, ValueError)


def _without_secrets(error: BaseException) -> str:
    """The message of an error on one line, without tokens and signatures of upload URLs."""
    from huggingface_hub import get_token

    # For uploads, the client raises a RuntimeError that names the file; its cause says what failed.
    causes = [error, error.__cause__] if type(error) is RuntimeError else [error]
    text = ": ".join(" ".join(str(cause).split()) for cause in causes) or type(error).__name__
    # A token that cannot be read is in no message.
    with suppress(OSError):
        text = text.replace(get_token() or "…", "…")
    text = re.sub(r"\bhf_\w+", "hf_…", text)
    return re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]*", r"\1", text)
