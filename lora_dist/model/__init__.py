"""Base models, LoRA, and the files of adapters and whole models."""
