"""What is learnt: segmentation and image classification, as the training loop wants them."""
