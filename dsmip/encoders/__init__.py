"""Frozen or tunable towers that turn texts and pictures into features."""
