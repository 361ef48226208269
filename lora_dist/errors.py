"""Exceptions that several packages raise or handle; a `UserError` is one that a user can fix."""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """An error that the user can fix. The message states the problem and the fix; no traceback is shown."""

    exit_code = 2
    label = "error"


class ProcessError(UserError):
    """A `UserError` of a single process; printed whatever its rank, because no other process reports it."""


class TrainingStoppedError(UserError):
    """Training cannot continue, although the settings are valid."""

    exit_code = 1


class PreemptedError(UserError):
    """The run was asked to stop and has saved a checkpoint to resume from.

    The code is that of `EX_TEMPFAIL` in sysexits.h: nothing is wrong, try again later.
    """

    exit_code = 75
    label = "stopped"


class NonFiniteGradientError(Exception):
    """The gradient of an update is not finite, and not because of fp16 loss scaling; no update is made."""


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message that is not empty, or the name of its type."""
    return next(filter(None, map(str.strip, str(error).splitlines())), type(error).__name__)


class ErrorCollector:
    """Collects the errors of a dry run, which reports all of them. Any other run ends at the first one.

    Attributes:
        dry_run: whether this is a dry run.
        found: messages of the errors found so far in a dry run.
    """

    def __init__(self, dry_run: bool) -> None:
        self.dry_run = dry_run
        self.found: list[str] = []

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Collects a `UserError` of this block in a dry run; re-raises it in any other run."""
        try:
            yield
        except UserError as error:
            if not self.dry_run:
                raise
            self.found.append(str(error))

    @contextmanager
    def raise_all(self) -> Iterator[None]:
        """Raises one `UserError` that lists the errors collected in this block and the error that ended it."""
        try:
            yield
        except UserError as error:
            if not self.found:
                raise
            raise type(error)(_listed([*self.found, str(error)])) from error
        if self.found:
            raise UserError(_listed(self.found))


def _listed(messages: list[str]) -> str:
    return "\n  ".join(["this run would not start:", *messages])
