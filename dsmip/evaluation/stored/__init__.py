"""Stored evaluations: the protocol they state, their ranks, and comparisons of them."""
