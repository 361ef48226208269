"""Distributed LoRA fine-tuning of image classifiers: `fit` and `load` from Python, and a command in each module.

Importing the package loads nothing heavy; its functions load torch when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_dist.deployment.image_classifier import ImageClassifier, load
    from lora_dist.train import TrainingResult, fit

__version__ = "0.1.0"
__all__ = ["ImageClassifier", "TrainingResult", "fit", "load"]

_MODULES = {
    "ImageClassifier": "lora_dist.deployment.image_classifier",
    "load": "lora_dist.deployment.image_classifier",
    "TrainingResult": "lora_dist.train",
    "fit": "lora_dist.train",
}


if not TYPE_CHECKING:  # to a type checker, every name would exist

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
