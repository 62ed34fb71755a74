"""Training: steps, workers, the first step, the feature cache, towers."""
