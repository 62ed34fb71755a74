"""Helpers of tests that start a Ray, or describe one: heads, disturbed jobs, what other users reach, KubeRay."""
