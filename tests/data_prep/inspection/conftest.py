"""An inspected data set with planted flaws, one for the room."""

import pytest

from data_prep.build.build import prepare
from data_prep.build.plan import DatasetOptions
from data_prep.formats.mimic import MimicRelease
from data_prep.inspection.report import Inspection, inspect_dataset
from dsmip.data.dataset import Dataset
from tests.support.planted import planted_release


@pytest.fixture(scope="package")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("planted")
    prepare(MimicRelease(planted_release(folder / "release")), folder / "data", DatasetOptions(name="planted"))
    return Dataset.open(folder / "data")


@pytest.fixture(scope="package")
def found(data: Dataset) -> Inspection:
    return inspect_dataset(data)
