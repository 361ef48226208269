"""Where a process computes, by its devices and the launcher's variables. Needs no accelerate."""

import os

import torch


def computes_on_cpu() -> bool:
    """Whether this process computes on the CPU, for want of an accelerator or because ACCELERATE_USE_CPU says so."""
    asked = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "t", "yes", "y", "on")
    return asked or not torch.accelerator.is_available()
