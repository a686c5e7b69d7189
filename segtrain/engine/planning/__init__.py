"""What a step needs: traced on fake tensors, solved for what fits, and applied at the start of a training."""
