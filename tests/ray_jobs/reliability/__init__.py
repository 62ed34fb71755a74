"""Tests: ray_jobs/reliability."""
