"""Experts beside one another: their survey of the knowledge base, and the oracle over them."""
