"""Jobs: one file per command."""
