"""A run, from its settings to what it hands over."""
