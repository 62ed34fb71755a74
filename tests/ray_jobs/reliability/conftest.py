"""A training that is disturbed, and what comes of it when nothing disturbs it."""

import pytest

from dsmip.config import ExperimentConfig
from dsmip.data.dataset import Dataset
from dsmip.runs.run import Run
from tests.support.cluster.disturbed import disturbed_config, undisturbed


@pytest.fixture(scope="session")
def config(small_config: ExperimentConfig) -> ExperimentConfig:
    return disturbed_config(small_config)


@pytest.fixture(scope="session")
def expected(tmp_path_factory: pytest.TempPathFactory, config: ExperimentConfig, small_data: Dataset) -> Run:
    return undisturbed(tmp_path_factory.mktemp("undisturbed"), config, small_data)
