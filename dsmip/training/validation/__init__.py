"""Validation while a model trains: metrics of the validation mentions, and hard negatives of those trained on."""
