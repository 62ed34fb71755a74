"""Figures of a training stand among Ray's metrics, as Prometheus and the dashboard read them."""

import time
import urllib.request
from typing import Any

import pytest
import ray
import torch

from dsmip.training.monitor import StepFigures, Watch
from ray_jobs.training.gauges import Gauges

pytestmark = [pytest.mark.usefixtures("ray_cluster"), pytest.mark.slow]
_DEADLINE_SECONDS = 90  # Ray hands metrics on every ten seconds


def exported() -> list[str]:
    """What this node's metrics endpoint says of our figures."""
    node: dict[str, Any] = ray.nodes()[0]
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(address, timeout=10) as answer:
        return [line for line in answer.read().decode().splitlines() if line.startswith("ray_dsmip_")]


def test_gauges_are_exported_with_their_training_and_worker() -> None:
    watch = Watch([Gauges("text", 1)], torch.device("cpu"), pytest.fail, write_seconds=0)
    watch.step_done(0, 0, 1, StepFigures(0.75, torch.tensor(2.0), 0.01, 8, 2.0, 0.5))
    watch.epoch_done({"epoch": 0.0, "loss": 0.75, "hits@1": 0.5})
    wanted = {
        "ray_dsmip_step_loss": 0.75,
        "ray_dsmip_step_samples_per_second": 4.0,
        "ray_dsmip_step_data_wait_share": 0.25,
        "ray_dsmip_epoch_hits_at_1": 0.5,
    }
    found: dict[str, float] = {}
    deadline = time.monotonic() + _DEADLINE_SECONDS
    while not wanted.keys() <= found.keys() and time.monotonic() < deadline:
        time.sleep(1)  # between looks
        lines = [line for line in exported() if 'training="text"' in line and 'worker="1"' in line]
        found = {line.partition("{")[0]: float(line.rpartition(" ")[2]) for line in lines}
    assert {name: found.get(name) for name in wanted} == wanted
