"""Tests: ray_jobs/cluster."""
