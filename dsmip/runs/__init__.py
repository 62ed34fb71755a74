"""Runs: a run's files; its configuration, parts, checkpoints, cached features, records and status."""
