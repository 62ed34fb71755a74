"""Tests: data_prep/demo."""
