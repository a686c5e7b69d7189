"""The built-in street scenes, drawn from a seed."""
