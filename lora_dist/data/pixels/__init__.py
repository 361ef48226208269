"""Decoding, augmentation and model input."""
