"""From files to batches: which images there are, what their labels mean, how they are augmented and read."""
