"""A served linker of random weights, and a client of it."""

from collections.abc import Iterator

import pytest
from starlette.testclient import TestClient

import dsmip
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
def client(linker: Linker) -> Iterator[TestClient]:
    app = create_app(
        Source(lambda: linker, lambda: ""),
        name="colours <b>",
        limits=LIMITS,
        examples=[Example(word="red", sentence="a <i>red</i> thing")],
    )
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client
