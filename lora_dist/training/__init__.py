"""Training, from the settings to the result."""
