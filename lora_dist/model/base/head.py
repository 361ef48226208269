"""Finds the head of a classifier, fits it to the classes, and identifies the backbone by a fingerprint."""

import copy
import hashlib
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_dist.errors import UserError
from lora_dist.model.base.initial_values import require_values

logger = logging.getLogger(__name__)
EMPTY_FINGERPRINT = hashlib.sha256().hexdigest()[:32]
"""Earlier versions recorded this for models whose backbone they did not find: it identifies nothing."""


def find_heads(model: Any, missing: Sequence[str] = ()) -> list[str]:
    """Returns the names of the modules to train in full: the head, and modules with random weights.

    The head is everything outside the backbone (`base_model_prefix`). Without a module of that name, or without
    anything outside it, the head is the modules whose shape follows the number of classes.

    Args:
        model: a `transformers` classifier.
        missing: parameters that the checkpoint lacked, such as the pooler of a masked-image model.

    Raises:
        UserError: the model has no head, or the head would be most of its weights.
    """
    children = dict(model.named_children())
    heads = [
        name
        for name, child in children.items()
        if name != model.base_model_prefix and any(True for _ in child.parameters())
    ]
    random = {*missing}
    if model.base_model_prefix not in children or not heads:
        heads = []
        random |= class_dimensions(model.config, type(model)).keys()
    # Shorter names come first, so that no head is inside another one.
    for module in sorted({parameter.rpartition(".")[0] for parameter in random}, key=lambda name: (len(name), name)):
        if module and not is_in(module, heads):
            heads.append(module)
    if not heads:
        raise UserError(f"{type(model).__name__} has no head: none of its layers follows the number of classes")
    _require_backbone(model, heads, missing)
    return heads


def is_in(name: str, modules: Sequence[str]) -> bool:
    """Whether a module or parameter is one of these modules, or inside one."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def class_dimensions(config: Any, make: Callable[[Any], Any]) -> dict[str, int]:
    """Returns the parameters whose shape follows the number of classes, with the dimension that does.

    Compares two models on the meta device, which `make` builds from configurations with 2 and 3 classes.
    """
    config = copy.deepcopy(config)
    shapes: list[dict[str, torch.Size]] = []
    for count in (2, 3):
        config.num_labels = count
        with torch.device("meta"):
            shapes.append({name: parameter.shape for name, parameter in make(config).named_parameters()})
    few, more = shapes
    return {
        name: next(index for index, sizes in enumerate(zip(few[name], more[name], strict=True)) if sizes == (2, 3))
        for name in few
        if (2, 3) in zip(few[name], more.get(name, ()), strict=False)
    }


def fit_head(model: Any, before: Mapping[int, str], labels: Sequence[str], missing: Sequence[str]) -> list[str]:
    """Fits the head of a base that classifies as many classes to `labels`, and logs what it changes.

    If the names are the same in another order, the head is permuted. If they differ, or are not numbered from 0, it is
    replaced, as for another number of classes. If they are LABEL_0, LABEL_1 … or not given, they say nothing, and the
    head stays.

    Args:
        before: `id2label` of the base.
        missing: parameters that the checkpoint lacked.

    Returns:
        The parameters that are random now.
    """
    names = [str(before[index]) for index in sorted(before)]
    from_0 = sorted(before) == [*range(len(before))]
    if (from_0 and names == list(labels)) or (missing and len(names) != len(labels)):
        return []
    dimensions = class_dimensions(model.config, type(model))
    if not dimensions or dimensions.keys() & {*missing}:
        return []
    if from_0 and names == [f"LABEL_{index}" for index in before]:
        logger.info("keeping the head of the base, which does not name its %d classes", len(labels))
        return []
    if from_0 and (order := reordering(names, labels)) is not None:
        logger.info("the base has the same classes in another order: permuting its head")
        for name, dimension in dimensions.items():
            parameter = model.get_parameter(name)
            parameter.data = parameter.data.index_select(dimension, order)
        return []
    reason = f"other classes ({', '.join(names[:3])}, …) than the data"
    if not from_0:
        reason = f"classes that are not numbered from 0 ({', '.join(map(str, sorted(before)[:3]))}, …)"
    logger.warning("the base has %s: giving it a new head", reason)
    renewed: list[str] = []
    for prefix in dict.fromkeys(name.rpartition(".")[0] for name in dimensions):
        module = model.get_submodule(prefix)
        for name, parameter in module.named_parameters(prefix, recurse=False):
            # `transformers` does not initialise weights that it has loaded.
            parameter._is_hf_initialized = False
            nn.init.constant_(parameter, torch.nan)
            renewed.append(name)
        model._init_weights(module)
    require_values(model, renewed)
    return sorted(dimensions)


def reordering(before: Sequence[str], after: Sequence[str]) -> Tensor | None:
    """Returns the indices in `before` of the names in `after`; None if they are not the same names."""
    return torch.tensor([before.index(name) for name in after]) if sorted(before) == sorted(after) else None


def fingerprint(model: nn.Module, heads: Sequence[str]) -> str:
    """Returns a digest of the backbone's fp32 weights that does not depend on their names.

    Raises:
        UserError: there are no such weights.
    """
    digests = sorted(
        hashlib.sha256(str(list(tensor.shape)).encode() + tensor.detach().cpu().contiguous().numpy().tobytes()).digest()
        for name, tensor in model.state_dict().items()
        if tensor.dtype == torch.float32 and not is_in(name, heads)
    )
    if not digests:
        raise UserError(f"{type(model).__name__} has no weights in fp32 outside its head ({', '.join(heads)})")
    return hashlib.sha256(b"".join(digests)).hexdigest()[:32]


def require_same_layers(model: Any, missing: Sequence[str], unexpected: Sequence[str]) -> None:
    """Raises a `UserError` if a checkpoint has other weights than the model, or other ones inside one of its modules.

    Such weights are of another architecture, or were fused for inference, as timm's `reparameterize_model` does, or
    were saved with a wrapper of the model, which gives them other names. Layers that it lacks, and modules that only
    the checkpoint has, such as a decoder, are no such case.

    Args:
        missing: parameters and buffers that the checkpoint lacks.
        unexpected: names in the checkpoint that the model does not have.
    """
    kind = getattr(model.config, "architecture", None) or type(model).__name__
    prefix = re.escape(model.base_model_prefix)
    wrapped = next((name for name in unexpected if re.search(rf"^({prefix}\.)?module\.|\b_orig_mod\.", name)), None)
    if missing and wrapped is not None:
        raise UserError(
            f"the checkpoint does not fit {kind}: it has names such as {wrapped}, which a wrapper gave them. Save the "
            f"model inside the wrapper (module. is that of DataParallel, _orig_mod. that of torch.compile)"
        )
    if unexpected and {name for name, _ in model.named_parameters()} <= {*missing}:
        raise UserError(
            f"the checkpoint does not fit {kind}: it has names such as {unexpected[0]}, and none such as {missing[0]}. "
            f"Rename its weights, or correct its config.json"
        )
    modules = {above for name, _ in model.named_parameters() for above in _above(name)} - {model.base_model_prefix}
    owners = {
        next((above for above in _above(name) if above in modules), ""): name
        for name in sorted(unexpected, reverse=True)
    }
    pairs = [(name, owners[above]) for name in missing for above in _above(name) if above in owners]
    of_classes = class_dimensions(model.config, type(model)) if pairs else {}
    for lacking, other in pairs:
        if lacking not in of_classes:
            raise UserError(
                f"the checkpoint does not fit {kind}: it lacks {lacking} and has {other} instead. If it was fused for "
                f"inference, take the checkpoint from before that; otherwise correct its config.json"
            )


def _above(name: str) -> list[str]:
    """The modules in which a parameter is, from the innermost one, without the model itself."""
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(len(parts) - 1, 0, -1)]


def _require_backbone(model: Any, heads: Sequence[str], missing: Sequence[str]) -> None:
    """Raises a `UserError` if the heads are most of the weights, not counting those that follow the classes."""

    def sizes(skipped: Sequence[str]) -> tuple[int, int]:
        counted = {name: tensor.numel() for name, tensor in model.named_parameters() if name not in skipped}
        return sum(size for name, size in counted.items() if is_in(name, heads)), sum(counted.values())

    head, total = sizes(())
    if 2 * head <= total:
        return
    # Thousands of classes on a small backbone.
    head, total = sizes(list(class_dimensions(model.config, type(model))))
    if 2 * head <= total:
        return
    kind = type(model).__name__
    if missing:
        raise UserError(
            f"the checkpoint has no weights for most of {kind}: {len(missing)} parameters are missing or have another "
            f"shape, such as {', '.join(missing[:3])}"
        )
    raise UserError(f"cannot tell the head of {kind} from its backbone: {', '.join(heads)} hold most of its weights")
