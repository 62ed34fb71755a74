"""The fixtures of the contract's tests: a system, its features and its scores, once per module."""

import json

import pytest
import torch

from dsmip.data.table import Table
from dsmip.models import systems
from dsmip.runs.load_config import parse_config
from dsmip.units.matcher import Scores
from tests.support.scoring.contract import BACKBONE, ENTITIES, MENTIONS, Subject, cases, part_of, seeded, shake, whole


@pytest.fixture(scope="module")
def architecture(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("backbone") / "contract.json"
    path.write_text(json.dumps(BACKBONE))
    return str(path)


@pytest.fixture(scope="module", params=cases())
def subject(request: pytest.FixtureRequest, architecture: str) -> Subject:
    name, form, part = request.param
    system = systems()[name]
    config = parse_config({"model": name, "backbone": {"architecture": architecture}, "system": form})
    with seeded(1):
        made = whole(system, config) if part is None else part_of(system, part, config)
        shake(made.matcher)
    made.matcher.eval()
    return made


@pytest.fixture(scope="module")
def features(subject: Subject) -> tuple[Table, Table]:
    with torch.no_grad():
        return subject.encode(MENTIONS, ENTITIES)


@pytest.fixture(scope="module")
def scores(subject: Subject, features: tuple[Table, Table]) -> Scores:
    with torch.no_grad():
        return subject.score(*features)
