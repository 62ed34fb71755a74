"""Helpers of tests that train: a toy training that is interrupted, workers side by side."""
