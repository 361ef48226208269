"""Makes an adapter of a checkpoint, with the records of its finished run."""

import logging
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_dist.errors import UserError
from lora_dist.model.base.model_files import ADAPTER_CONFIG
from lora_dist.model.lora.adapter_io import PREFIX, WEIGHTS, plain_name
from lora_dist.model.lora.adapters import plain_state
from lora_dist.model.lora.parameter_names import DEFAULT
from lora_dist.model.trained.bundle import CALIBRATION, THRESHOLDS
from lora_dist.storage.checkpoint_files import TRAINED, find_damage, read_weights

logger = logging.getLogger(__name__)


def is_checkpoint(directory: Path) -> bool:
    """Whether a directory is that of a checkpoint."""
    return (directory / TRAINED).is_file()


def write_adapter_of_checkpoint(checkpoint: Path, out: Path) -> None:
    """Writes the adapter that the run would have as its result, if this checkpoint were its best.

    The temperature of the result is written only if the weights are those of the result.

    Args:
        checkpoint: in `checkpoints/` of a run that has finished.
        out: new directory.

    Raises:
        UserError: the checkpoint is damaged, or the run has not written an adapter.
    """
    run = checkpoint.resolve().parents[1]
    result, initial = run / "adapter", run / "adapter_init"
    if damage := find_damage(checkpoint):
        raise UserError(f"{checkpoint}: {damage}")
    if not (result / ADAPTER_CONFIG).is_file():
        raise UserError(
            f"{checkpoint} has no classes and no base; they are in the result of its run, and there is no adapter in "
            f"{result}. Let the run finish first (--resume_from_checkpoint auto)"
        )
    trained = _plain(read_weights(checkpoint))
    if initial.is_dir():
        trained = plain_state(trained, _plain(load_file(initial / WEIGHTS)))
    # The file also holds tensors that are not trained, such as copies of norms: all checkpoints of a run share them.
    of_result = _plain(load_file(result / WEIGHTS))
    state = of_result | trained
    shutil.copytree(result, out, ignore=shutil.ignore_patterns(WEIGHTS, "README.md"))
    if not all(name in of_result and torch.equal(tensor, of_result[name]) for name, tensor in trained.items()):
        _drop_temperature(checkpoint, out)
    save_file({PREFIX + name: tensor for name, tensor in state.items()}, out / WEIGHTS, metadata={"format": "pt"})


def _drop_temperature(checkpoint: Path, out: Path) -> None:
    """Removes the temperature, which was fitted to other weights, and warns of thresholds that were chosen for them."""
    if (out / CALIBRATION).is_file():
        (out / CALIBRATION).unlink()
        logger.warning(
            "%s is not calibrated: the temperature of its run was fitted to the weights of the result", checkpoint
        )
    if (out / THRESHOLDS).is_file():
        logger.warning("%s has the thresholds of its run, which were chosen for the weights of the result", checkpoint)


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under plain names, without the name of the adapter that PEFT's modules have."""
    magnitude = f".lora_magnitude_vector.{DEFAULT}.weight"
    named = {
        plain_name(key.replace(magnitude, ".lora_magnitude_vector").replace(f".{DEFAULT}.", ".")): tensor
        for key, tensor in tensors.items()
    }
    return {name: tensor for name, tensor in named.items() if name is not None}
