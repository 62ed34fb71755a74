"""The fixtures of the contract's tests: a system, its features and its scores, once per module."""

import json
from collections.abc import Callable
from functools import cache

import pytest
import torch

from dsmip.data.table import Table
from dsmip.units.matcher import Scores
from tests.support.encoders.small_backbones import SMALL_BACKBONES
from tests.support.scoring.contract import BACKBONE, DEEP, Case, Subject, cases, seeded, shake


@pytest.fixture(scope="package")
def architecture_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """A small backbone of a kind, written when it is first asked for."""

    @cache
    def written(kind: str) -> str:
        folder = tmp_path_factory.mktemp("backbone")
        if kind != DEEP:
            return SMALL_BACKBONES[kind](folder)
        (folder / "deep.json").write_text(json.dumps(BACKBONE))
        return str(folder / "deep.json")

    return written


@pytest.fixture(scope="module", params=cases())
def subject(request: pytest.FixtureRequest, architecture_of: Callable[[str], str]) -> Subject:
    case: Case = request.param
    with seeded(1):
        made = case.subject(architecture_of(case.kind))
        shake(made.matcher)
    made.matcher.eval()
    return made


@pytest.fixture(scope="module")
def features(subject: Subject) -> tuple[Table, Table]:
    with torch.no_grad():
        return subject.encode(subject.sample.mentions, subject.sample.entities)


@pytest.fixture(scope="module")
def scores(subject: Subject, features: tuple[Table, Table]) -> Scores:
    with torch.no_grad():
        return subject.score(*features)
