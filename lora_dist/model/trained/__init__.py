"""Trained classifiers: their files and labels, loading, and how logits become an answer."""
