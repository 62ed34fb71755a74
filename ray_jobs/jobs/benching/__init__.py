"""The job `dsmip bench`: checks of a suite, its steps side by side, and its report."""
