"""Terminal: how commands show progress, tables and lines."""
