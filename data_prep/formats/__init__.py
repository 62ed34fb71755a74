"""Layouts of raw releases: one file per layout, and what layouts share."""
