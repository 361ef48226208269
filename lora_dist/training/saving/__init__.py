"""What a run writes: its state, checkpoints and the result."""
