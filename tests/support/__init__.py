"""Helpers that several test modules share. Test modules import from here and never from one another."""
