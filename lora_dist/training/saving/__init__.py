"""The files of a run: its state, checkpoints and the result."""
