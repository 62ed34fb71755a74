"""Measurements that stay in the repository; nothing imports them but their tests.

python -m benchmarks.ranking         ranking against the published evaluator's logic      benchmarks/ranking/
python -m benchmarks.gpu             all that a GPU does, in eight minutes
python -m benchmarks.memory          memory of a ranking beside its index
python -m benchmarks.stage_one       what training costs                                  benchmarks/training/
python -m benchmarks.big_release     a release of any size in the MIMIC layout            benchmarks/data/
python -m benchmarks.prepare         preparing against the bare work on the same pictures
python -m benchmarks.shards          the training stream against bare decoding
python -m benchmarks.stores          the training stream out of an object store
"""
