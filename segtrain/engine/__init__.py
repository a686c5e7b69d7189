"""Training: the loop and what it works with."""
