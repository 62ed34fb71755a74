"""Distillation: small vectors of items whose products imitate a model's exact scores, for a search of candidates."""
