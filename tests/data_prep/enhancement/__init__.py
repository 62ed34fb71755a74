"""Tests: data_prep/enhancement."""
