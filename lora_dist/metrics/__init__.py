"""Metrics of classification, which training, prediction and audit share."""
