"""One file a command; imported by name when the command runs."""
