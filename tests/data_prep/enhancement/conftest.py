"""A data set of words that name several entities, one for the room."""

import pytest

from dsmip.data.dataset import Dataset
from tests.support.ambiguous import ambiguous


@pytest.fixture(scope="package")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return ambiguous(tmp_path_factory.mktemp("ambiguous"))
