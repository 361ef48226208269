"""What a run shows: log lines, TensorBoard and reports."""
