"""Tests: benching."""
