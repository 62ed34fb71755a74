"""Tests: data_prep."""
