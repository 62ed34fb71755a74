"""Tests: data_prep/formats."""
