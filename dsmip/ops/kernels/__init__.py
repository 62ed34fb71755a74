"""Compiled forms of what `dsmip.ops` does in plain PyTorch."""
