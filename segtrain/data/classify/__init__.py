"""Image classification: images with one class each."""
