"""Tests: data_prep/inspection."""
