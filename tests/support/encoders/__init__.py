"""Backbones of tests: narrow ones, one of each kind of tower, and real weights from packages."""
