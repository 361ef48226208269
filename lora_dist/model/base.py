"""The classifier: backbone and head from `transformers`, what of it trains, and who the base is."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification

from lora_dist import demo, hub_client
from lora_dist.settings.train import LoraSettings, ModelSettings, Settings
from lora_dist.errors import UserError
from lora_dist.model import adapters


@dataclass(frozen=True)
class Base:
    """A base model as loaded, before anything is added to it.

    Attributes:
        model: the classifier, a `transformers` model in fp32, its head sized for the labels.
        processor: its image processor.
        heads: names of the modules that are not of the backbone, and of parts that the checkpoint lacked.
        missing: parameters that the checkpoint lacked or had in another shape, and that are random now.
        name: path or Hub name.
        revision: commit on the Hub, if it came from there.
        fingerprint: of the backbone's weights.
    """

    model: Any
    processor: Any
    heads: list[str]
    missing: list[str]
    name: str
    revision: str | None
    fingerprint: str

    def identity(self) -> dict[str, str | None]:
        """What an adapter says of the base it belongs to."""
        return {"model_name_or_path": self.name, "revision": self.revision, "fingerprint": self.fingerprint}


def load_base(
    name: str,
    labels: Sequence[str],
    *,
    revision: str | None = None,
    seed: int = 0,
    init_from_config: bool = False,
    trust_remote_code: bool = False,
) -> Base:
    """Loads a base model and its processor, in fp32, with a head for `labels`.

    Args:
        name: Hub name, local directory, or a packaged model.
        labels: class names in order.
        revision: branch, tag or commit on the Hub.
        seed: of weights that the checkpoint lacks, such as a new head.
        init_from_config: all weights are random.
        trust_remote_code: run code that comes with the model.

    Raises:
        UserError: the model cannot be found or is no image classifier.
    """
    name = demo.local_path(name)
    source: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    labelled: dict[str, Any] = {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {label: place for place, label in enumerate(labels)},
    }
    torch.manual_seed(seed)
    try:
        with hub_client.reading(f"the base model {name}", f"`hf download {name}`"):
            processor = AutoImageProcessor.from_pretrained(name, **source)
            config = AutoConfig.from_pretrained(name, **source, **labelled)
            model, missing = (
                _random(config, trust_remote_code) if init_from_config else _pretrained(name, config, source)
            )
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        # One of these comes of a missing name, an unreachable Hub, a foreign architecture and a truncated file.
        raise cannot_load(name, error) from error
    heads = find_heads(model, missing)
    return Base(
        model=model,
        processor=processor,
        heads=heads,
        missing=missing,
        name=name,
        revision=getattr(config, "_commit_hash", None),
        fingerprint=fingerprint(model, heads),
    )


def _random(config: Any, trust_remote_code: bool) -> tuple[Any, list[str]]:
    """A model with random weights, none of which is missing."""
    config.architectures = config.architectures or []
    made = AutoModelForImageClassification.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
    return made, []


def _pretrained(name: str, config: Any, source: dict[str, Any]) -> tuple[Any, list[str]]:
    """A model with its weights, and the names of those that are missing or of another shape."""
    model, loading = AutoModelForImageClassification.from_pretrained(
        name,
        config=config,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        dtype=torch.float32,
        **source,
    )
    return model, sorted({*loading["missing_keys"], *(mismatch[0] for mismatch in loading["mismatched_keys"])})


def cannot_load(name: str, error: Exception) -> UserError:
    """In words of this project what `transformers` says of a model that it cannot load."""
    if "trust_remote_code" in str(error):
        return UserError(
            f"the model {name!r} brings code of its own. If you trust where it comes from, --trust_remote_code runs it"
        )
    message = f"cannot load the base model {name!r} as an image classifier: "
    if Path(name).is_dir():
        return UserError(f"{message}{error}")
    elsewhere = "\nIf it is elsewhere now, say where: predict takes --base_model, and train --model_name_or_path"
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        return UserError(f"{message}there is no such directory.{elsewhere}")
    return UserError(
        f"{message}{error}{elsewhere}\nWhere there is no network, bring it here before, by `hf download {name}`; "
        "demo:vit, which is small, needs none"
    )


def load_base_of(settings: Settings, labels: Sequence[str], revision: str | None = None) -> Base:
    """The base that a training run's settings name.

    Args:
        settings: of the run.
        labels: class names in order.
        revision: to load it once more as it was, whatever has become of it on the Hub.
    """
    return load_base(
        settings.model.model_name_or_path,
        labels,
        revision=revision or settings.model.model_revision,
        seed=settings.run.seed,
        init_from_config=settings.model.init_from_config,
        trust_remote_code=settings.model.trust_remote_code,
    )


def find_heads(model: Any, missing: Sequence[str] = ()) -> list[str]:
    """Names of the modules to train in full: all that is not of the backbone, and what the checkpoint lacked.

    Args:
        model: a `transformers` classifier.
        missing: parameters that the checkpoint did not have, such as the pooler of a masked-image model, or had in
            another shape. `transformers` makes them anew; left frozen they would be noise.
    """
    heads = [
        name
        for name, child in model.named_children()
        if name != model.base_model_prefix and any(True for _ in child.parameters())
    ]
    # Shorter names come first, so that no head stands inside another one.
    for module in sorted({parameter.rpartition(".")[0] for parameter in missing}, key=lambda name: (len(name), name)):
        if module and not any(module == head or module.startswith(f"{head}.") for head in heads):
            heads.append(module)
    if not heads:
        raise UserError(f"{type(model).__name__} has no head beside its backbone {model.base_model_prefix!r}")
    return heads


def fingerprint(model: nn.Module, heads: Sequence[str]) -> str:
    """Digest of the backbone's weights in fp32, whatever names a release of `transformers` gives them."""
    digests = sorted(
        hashlib.sha256(str(list(tensor.shape)).encode() + tensor.detach().cpu().contiguous().numpy().tobytes()).digest()
        for name, tensor in model.state_dict().items()
        if tensor.dtype == torch.float32 and not any(name.startswith(f"{head}.") for head in heads)
    )
    return hashlib.sha256(b"".join(digests)).hexdigest()[:32]


def make_trainable(base: Base, settings: ModelSettings, lora: LoraSettings) -> nn.Module:
    """The model as it trains: with LoRA, with a new head on a frozen backbone, or whole.

    Raises:
        UserError: the model cannot be adapted so, or cannot recompute its activations.
    """
    model = base.model
    if settings.tuning == "lora":
        model = adapters.inject(model, lora, base.heads)
    elif settings.tuning == "head":
        model = adapters.inject_head_only(model, base.heads)
    else:
        model.requires_grad_(True)
    if settings.gradient_checkpointing:
        _checkpoint_gradients(base.model)
    freeze_unreached(model, base)
    if settings.torch_compile:
        model.compile()
    return model


def _checkpoint_gradients(model: Any) -> None:
    # After LoRA is in: PEFT would hook the embeddings for the sake of reentrant checkpoints, and breaks on Swin's.
    try:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    except ValueError as error:
        raise UserError(f"--gradient_checkpointing: {error} Train without it, with smaller batches.") from error


def freeze_unreached(model: nn.Module, base: Base) -> None:
    """Freezes parameters that the loss does not reach, such as a mask token: under DDP they would stop the run."""
    size = base.processor(_blank(), return_tensors="pt")["pixel_values"]
    model.eval()
    model(pixel_values=size).logits.float().sum().backward()
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.grad is None:
            parameter.requires_grad_(False)
        parameter.grad = None


def _blank() -> Any:
    from PIL import Image

    return Image.new("RGB", (64, 64), (127, 127, 127))


def set_training(model: nn.Module) -> None:
    """Training mode, except for batch norms that do not train: their statistics belong to the frozen base."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not _trains(module):
            module.eval()


def _trains(module: nn.Module) -> bool:
    """Whether a module's own parameters train; of a batch norm, a bias alone does not make it."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return module.weight is not None and module.weight.requires_grad
    return any(parameter.requires_grad for parameter in module.parameters(recurse=False))


def trained_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of all that training changes: parameters, and the buffers that stand beside them."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield name, parameter
    for prefix, module in model.named_modules():
        if _trains(module):
            for name, buffer in module.named_buffers(recurse=False):
                if name not in module._non_persistent_buffers_set:
                    yield f"{prefix}.{name}" if prefix else name, buffer


def load_trained(model: nn.Module, trained: Mapping[str, Tensor]) -> None:
    """Puts the tensors that training changed into a model, in place."""
    with torch.no_grad():
        for name, target in trained_tensors(model):
            target.copy_(trained[name])


def host_copy(tensor: Tensor) -> Tensor:
    """A copy on the host, in fp32 where it is a floating-point tensor."""
    return tensor.detach().to("cpu", torch.float32 if tensor.is_floating_point() else None, copy=True).contiguous()


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Numbers of trainable and of all parameters; a head counts once, although PEFT keeps its first state as well."""
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    total = sum(parameter.numel() for name, parameter in model.named_parameters() if adapters.is_counted(name))
    return trainable, total
