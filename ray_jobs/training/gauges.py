"""A training's figures as Ray metrics, so that they stand in Ray's dashboard and in Prometheus beside the cluster's."""

import re
from collections.abc import Mapping

from ray.util.metrics import Gauge

from dsmip.training.monitor import Outcome, Position, Writer


class Gauges(Writer):
    """One gauge per figure, named `ray_dsmip_<figure>` there, with the tags `training` and `worker`."""

    def __init__(self, training: str, worker: int) -> None:
        self._tags = {"training": training, "worker": str(worker)}
        self._gauges: dict[str, Gauge] = {}

    def write(self, position: Position, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            if name not in self._gauges:
                metric = f"dsmip_{re.sub(r'[^a-zA-Z0-9]', '_', name)}"
                self._gauges[name] = Gauge(metric, f"{name} of a training", tuple(self._tags))
            self._gauges[name].set(value, self._tags)

    def close(self, outcome: Outcome) -> None:
        """Ray forgets the gauges of a process that has ended."""
