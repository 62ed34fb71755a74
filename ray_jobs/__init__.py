"""The storey that knows Ray: the command line, its jobs, and scripts of them for `ray job submit`."""
