"""Training data, losses, measures."""
