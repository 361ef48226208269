"""The kinds of labels: one class, or several labels per image; their losses and evaluations."""
