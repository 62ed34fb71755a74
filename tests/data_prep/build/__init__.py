"""Tests: data_prep/build."""
