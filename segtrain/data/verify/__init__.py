"""Verify that data is what the configuration says."""
