"""Explains why a base model cannot be loaded, with the way out: each model and library has errors of its own."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError

from lora_dist.errors import UserError
from lora_dist.model.base.drop_path import RATE
from lora_dist.model.base.model_files import ADAPTER_CONFIG, find_result, result_hint, weight_files


@contextmanager
def loading_errors(name: str, place: str, drop_path: float | None) -> Iterator[None]:
    """Raises each error of loading as a `UserError`.

    A missing name, an unreachable Hub, a missing package, a truncated file, and a configuration that a library does not
    take: each model has its own exception for them.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        if drop_path is not None and RATE in str(error):
            raise UserError(f"--drop_path: {name} has no stochastic depth; leave it out ({error})") from error
        raise cannot_load(place, error) from error


def cannot_load(name: str, error: Exception) -> UserError:
    """Converts an error of `transformers` to a `UserError`, with advice on the Hub if that is the reason."""
    if isinstance(error, ImportError):
        # The messages of `transformers` contain the command; a ModuleNotFoundError has the name.
        packages = re.findall(r"pip install ([\w .-]+)`", str(error)) or [(error.name or "").partition(".")[0]]
        package = packages[0]
        if error.name and find_spec(package):
            return UserError(f"the code of the model {name!r} does not run with the installed {package}: {error}")
        line = f"pip install {' '.join(packages)}" if packages[0] else str(error).strip()
        return UserError(f"the model {name!r} needs a package that is not installed: {line}")
    if "trust_remote_code" in str(error):
        return UserError(
            f"the model {name!r} contains its own code. If you trust its source, --trust_remote_code runs it"
        )
    if (Path(name) / ADAPTER_CONFIG).is_file() and not weight_files(Path(name)):
        return UserError(
            f"{name!r} is an adapter, not a base model: continue its training with --adapter_name_or_path, or merge it "
            f"with lora_dist.predict --adapter {name} --merge_to DIRECTORY"
        )
    message = f"cannot load the base model {name!r} as an image classifier: "
    if not (Path(name) / "config.json").is_file() and (result := find_result(Path(name))):
        flag = "adapter_name_or_path" if (result / ADAPTER_CONFIG).is_file() else "model_name_or_path"
        return UserError(f"{message}it has no config.json{result_hint(Path(name))}, as --{flag}")
    # `transformers` goes on with the names of all models that it has.
    reason = re.split(r"\nModel type should be one of|, or one of the following `model_type`", str(error))[0]
    reason = reason or type(error).__name__
    if "Weights only load failed" in reason:
        # torch's own message advises to run the code in it.
        reason = (
            "pytorch_model.bin is damaged, or holds more than tensors, and is not opened. Ask its author for "
            "model.safetensors, or for a file that torch.load reads with weights_only=True"
        )
    if "meta tensor" in reason:
        reason = (
            f"its constructor needs the values of tensors, and transformers calls it without memory: correct its code, "
            f"where it says .item(), .tolist() or float() ({reason})"
        )
    if isinstance(error, StrictDataclassError):
        reason = f"config.json is damaged: {' '.join(reason.split())}"
    lacks_processor = "load image processor" in reason
    if lacks_processor and Path(name).is_dir():
        return UserError(
            f"the model {name!r} has no image processor (preprocessor_config.json): name one with "
            f"--image_processor_name"
        )
    from_hub = isinstance(error, OSError) and "does not appear to have" not in reason
    if Path(name).is_dir() or not from_hub:
        return UserError(f"{message}{reason}")
    elsewhere = "\nIf it has moved, pass its location: predict as --base_model, train as --model_name_or_path"
    if lacks_processor:
        elsewhere += "\nIf it has no image processor, name one with --image_processor_name"
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        return UserError(f"{message}there is no such directory.{elsewhere}")
    if found := _in_timm(name):
        return UserError(f"{message}there is no such directory, and models of timm are called {found}")
    return UserError(
        f"{message}there is no such directory, and loading it from the Hub failed: {reason}{elsewhere}\n"
        f"Without a network, run `hf download {name}` beforehand; the small demo:vit needs no network"
    )


def _in_timm(name: str) -> str:
    """Names on the Hub of the checkpoints of a model that is given by its name in timm; empty for other names."""
    architecture = name.partition(".")[0]
    if "/" in name or find_spec("timm") is None:
        return ""
    import timm

    if not timm.is_model(architecture):
        return ""
    known = timm.list_pretrained(f"{architecture}.*")
    checkpoints = [name] if name in known else known
    return " or ".join(f"timm/{one}" for one in checkpoints[:3]) or f"timm/{architecture}.TAG"
