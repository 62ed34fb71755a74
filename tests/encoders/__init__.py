"""Tests: encoders."""
