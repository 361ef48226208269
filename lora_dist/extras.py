"""Optional packages: what is missing is named with the command that installs it."""

from importlib import import_module

from lora_dist.errors import UserError


def require(extra: str, flag: str, *modules: str) -> None:
    """Checks that the modules of an extra can be imported.

    Args:
        extra: its name in `pyproject.toml`.
        flag: what needs it, for the message.
        modules: to import.

    Raises:
        UserError: one of them is not installed.
    """
    for module in modules:
        try:
            import_module(module)
        except ImportError as error:
            raise UserError(
                f"{flag} needs {module} ({error}): pip install 'lora_dist[{extra}]', or in a checkout "
                f"pip install -e '.[{extra}]'"
            ) from error
