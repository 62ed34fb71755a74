"""Tests: suites."""
