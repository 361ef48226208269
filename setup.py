"""Adds accelerate_configs/ to the package; everything else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["lora_dist*"]), "lora_dist.accelerate_configs"],
    package_dir={"lora_dist.accelerate_configs": "accelerate_configs"},
)
