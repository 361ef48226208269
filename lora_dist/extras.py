"""Optional dependencies."""

from importlib import import_module

from lora_dist.errors import UserError


def require(extra: str, flag: str, *modules: str) -> None:
    """Raises a `UserError` that says how to install an extra of pyproject.toml unless `modules` can be imported.

    Args:
        flag: Setting that needs the extra.
    """
    for module in modules:
        try:
            import_module(module)
        except ImportError as error:
            raise UserError(
                f"{flag} needs {module} ({error}): pip install 'lora_dist[{extra}]', or in a checkout "
                f"pip install -e '.[{extra}]'"
            ) from error
