"""Several processes of one command: their collectives, and what happens when one of them dies."""
