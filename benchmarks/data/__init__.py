"""Data: a release of any size, its preparation, and the streams out of it."""
