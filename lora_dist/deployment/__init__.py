"""Uses trained models: classifies, merges, exports and serves."""
