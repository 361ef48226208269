"""Benchmarks of training: speed, memory, bottleneck, and a comparison with `transformers.Trainer`."""
