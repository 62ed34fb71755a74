"""Experts as distributions over entities: statistics of their scores, and their fusions."""
