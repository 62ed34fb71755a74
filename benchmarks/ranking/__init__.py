"""Ranking: time of a pair against the published evaluator, and memory."""
