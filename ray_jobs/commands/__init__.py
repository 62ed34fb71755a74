"""Commands of `dsmip` by subject, as functions that `ray_jobs.cli` registers."""
