"""Towers of CLIP-like networks: text or pictures in, a pooled vector and tokens out; prompts in their layers."""
