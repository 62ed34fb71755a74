"""Training on Ray: Ray Train and Ray Tune, checkpoints, restarts, hanging workers."""
