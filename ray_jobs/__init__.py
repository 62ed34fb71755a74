"""Jobs: the storey that knows Ray. Each file is one job, a command of `dsmip` and a script for `ray job submit`."""
