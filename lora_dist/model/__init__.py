"""Base models, LoRA and what is kept of them."""
