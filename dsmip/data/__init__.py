"""Data: records, the manifest, tar shards, the order of training, batches and tables."""
