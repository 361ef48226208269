"""The processes of a launch: start, agreement, signals, end."""
