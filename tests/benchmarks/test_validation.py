"""The benchmark of validations at a size of seconds."""

from pathlib import Path

import pytest

from benchmarks.training.validation import WAYS, measure
from dsmip.data.dataset import Dataset


@pytest.mark.soak
def test_three_ways_are_measured(small_data: Dataset, tmp_path: Path) -> None:
    found = measure(small_data, "demo", rounds=1)
    assert found["entities"] == small_data.num_entities
    for way in WAYS:
        assert 0 <= found[f"{way}: wait share"] <= 1
        assert found[f"{way}: s"] > 0
    assert found[f"{WAYS[0]}: times as fast"] == 1
