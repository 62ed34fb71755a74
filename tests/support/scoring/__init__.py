"""Helpers of tests that score pairs: systems under contract, units, matchers and rankings of known scores."""
