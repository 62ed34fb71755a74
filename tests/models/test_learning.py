"""Every system of one part learns: on small data it finds the gold first, far above chance."""

from pathlib import Path

import pytest

from dsmip.data.dataset import Dataset
from dsmip.runs.load_config import changed
from dsmip.runs.run import Run
from dsmip.training.local_context import LocalContext
from dsmip.training.stages import train_part
from tests.support.scoring.linked_runs import small_system

RATES = {
    "clip": 3e-3,
    "mimic": 3e-3,
    "m3el": 3e-3,
    "mmoe": 3e-3,
    "bert": 3e-3,
    "jmel": 3e-3,
    "dzmned": 1e-2,
    "ghmfc": 3e-3,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RATES)
def test_it_learns(name: str, small_data: Dataset, narrow_backbone: Path, tmp_path: Path) -> None:
    """Of 11 entities the gold is found first; by chance one in eleven, and a mean reciprocal rank of 0.27."""
    train = {"epochs": 15, "batch_size": 12, "learning_rate": RATES[name]}
    config = changed(small_system(name, narrow_backbone), {"system": {"tune": "full"}, "train": train})
    run = Run.create(tmp_path / "run", config, small_data)
    result = train_part(run, name, LocalContext(tmp_path / "work"))
    assert result.best["mrr"] > 0.75
    assert result.history[-1]["loss"] < 0.6 * result.history[0]["loss"]
