"""The output of a run for people: log lines, TensorBoard and reports."""
