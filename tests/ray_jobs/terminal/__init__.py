"""Tests: ray_jobs/jobs."""
