"""Servers that stand in for services that nobody can be asked to reach."""
