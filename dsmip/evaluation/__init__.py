"""Evaluation: exact ranking over the whole knowledge base, its index, metrics, reports and comparisons."""
