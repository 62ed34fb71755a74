"""The report of a run as one page: its figures, its curves, and its mentions to look at."""
