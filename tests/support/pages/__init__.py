"""Helpers of tests that open pages in a browser."""
