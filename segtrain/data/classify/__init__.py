"""Whole images with one class each."""
