"""Storage: atomic files, object stores, the storage of runs and of datasets, and the cache of their copies."""
