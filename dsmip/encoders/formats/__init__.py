"""Weights files of other libraries and in other forms, read as tensors alone under open_clip's names."""
