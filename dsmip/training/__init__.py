"""Training: the loop, gradients over workers, both stages, pretraining, and who is told of it."""
