"""Fused experts: the matcher, and the gate that weighs them."""
