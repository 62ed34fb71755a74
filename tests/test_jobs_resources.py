"""What a cluster can give: whole workers on whole nodes, those that its autoscaler may add included."""

import math

import pytest

from dsmip.errors import UserError
from ray_jobs import resources
from ray_jobs.resources import NodeKind, Request, check_feasible

TWO_SMALL = [NodeKind({"CPU": 2.0}, 1.0), NodeKind({"CPU": 2.0, "GPU": 1.0}, 1.0)]
SCALING = [NodeKind({"CPU": 0.0}, 1.0), NodeKind({"CPU": 8.0, "GPU": 4.0}, 2.0), NodeKind({"CPU": 64.0}, 0.0)]


@pytest.mark.parametrize(
    ("kinds", "request_", "fits"),
    [
        (TWO_SMALL, Request("x", 1, 2, 0), True),
        (TWO_SMALL, Request("x", 1, 3, 0), False),  # 4 CPUs in all, but no node has 3
        (TWO_SMALL, Request("x", 2, 1.5, 0), True),
        (TWO_SMALL, Request("x", 3, 1.5, 0), False),
        (TWO_SMALL, Request("x", 6, 0.6, 0), True),
        (TWO_SMALL, Request("x", 7, 0.6, 0), False),
        (TWO_SMALL, Request("x", 20, 0.2, 0), True),  # 2 / 0.2 is 10 in spite of floats
        (TWO_SMALL, Request("x", 1, 1, 1), True),
        (TWO_SMALL, Request("x", 2, 1, 1), False),
        (TWO_SMALL, Request("x", 4, 0, 0.25), True),
        (TWO_SMALL, Request("x", 1000, 0, 0), True),
        (SCALING, Request("x", 8, 2, 1), True),
        (SCALING, Request("x", 9, 1, 1), False),
        (SCALING, Request("x", 1, 64, 0), False),  # the maximum of that node type is 0
        ([NodeKind({"CPU": 4.0}, math.inf)], Request("x", 1000, 4, 0), True),
    ],
)
def test_what_fits(monkeypatch: pytest.MonkeyPatch, kinds: list[NodeKind], request_: Request, fits: bool) -> None:
    monkeypatch.setattr(resources, "cluster_kinds", lambda: kinds)
    if fits:
        check_feasible([request_])
        return
    with pytest.raises(UserError, match=r"x asks .* which this cluster can never give"):
        check_feasible([Request("small", 1, 0.1, 0), request_])


def test_the_message_says_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "cluster_kinds", lambda: TWO_SMALL)
    with pytest.raises(UserError, match=r"3 workers with 9 CPU and 2 GPU.*biggest node has 2 CPU and 1 GPU.*4 CPU"):
        check_feasible([Request("visual", 3, 9, 2)])
