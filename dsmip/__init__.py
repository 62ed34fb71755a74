"""Multimodal entity linking: encoders, experts, the gate and exact full-KB ranking. Knows nothing of Ray."""

__version__ = "0.1.0"
