"""From an open release to a dataset directory: rules, plan on disk, tasks, and any runner of tasks."""
