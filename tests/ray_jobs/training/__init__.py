"""Tests: ray_jobs/training."""
