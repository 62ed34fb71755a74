"""Tests: ray_jobs."""
