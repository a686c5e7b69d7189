"""From files to training samples: which pictures there are, what their labels mean, how they become batches."""
