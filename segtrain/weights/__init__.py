"""Files that hold a network: checkpoints and weights from elsewhere."""
