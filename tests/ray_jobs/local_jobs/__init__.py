"""Tests: ray_jobs/local_jobs."""
