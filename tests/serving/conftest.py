"""A served linker of random weights, and a client of it."""

from collections.abc import Iterator

import pytest
import torch
from starlette.testclient import TestClient

import dsmip
from dsmip.calibration.calibration import BestScores, Calibration
from dsmip.linking.bundle import Example
from dsmip.linking.linker import Linker
from dsmip.runs.run import Run
from dsmip.serving.app import create_app
from dsmip.serving.limits import Limits
from dsmip.serving.served import Source

LIMITS = Limits(body_bytes=200_000, image_bytes=50_000, text_length=500, mentions=4, top=8)


@pytest.fixture(scope="module")
def linker(run: Run) -> Linker:
    return dsmip.load(run.folder)


@pytest.fixture(scope="module")
def calibrated(linker: Linker) -> Linker:
    """The same, with confidences."""
    score_MK = torch.tensor([[9.0, 1.0, 0.0, -1.0], [2.0, 1.9, 1.8, 1.7]]).repeat(20, 1)
    is_gold_MK = torch.zeros(40, 4, dtype=torch.bool)
    is_gold_MK[::2, 0] = is_gold_MK[1::2, 1] = True
    best = BestScores(score_MK, torch.zeros(40, 4, dtype=torch.long))
    calibration = Calibration.fit("dsmip", "index", linker.model.choices, best, is_gold_MK)
    return Linker(linker.model, linker.knowledge_base, linker.search, calibration=calibration)


@pytest.fixture(scope="module")
def client(linker: Linker) -> Iterator[TestClient]:
    app = create_app(
        Source(lambda: linker, lambda: ""),
        name="colours <b>",
        limits=LIMITS,
        examples=[Example(word="red", sentence="a <i>red</i> thing")],
    )
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client
