"""LoRA in a base model: its layers, names and files, and the parameters that train."""
