"""Probing: what items, pairs and steps of each part of a system cost, measured on a few of them."""
