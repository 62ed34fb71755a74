"""What trainings ask of a cluster: whether it can ever be fulfilled, and what to say while it is not."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from dsmip.errors import UserError

_SLACK = 1e-6  # fractions of CPUs are floats


@dataclass(frozen=True, slots=True)
class Request:
    """Workers that run at the same time, each with `cpu` CPUs and `gpu` GPUs on one node."""

    name: str
    workers: int
    cpu: float
    gpu: float

    def __str__(self) -> str:
        gpus = f" and {self.gpu:g} GPU" if self.gpu else ""
        return f"{self.name} asks {self.workers} worker{'s' * (self.workers > 1)} with {self.cpu:g} CPU{gpus} each"


@dataclass(frozen=True, slots=True)
class NodeKind:
    """Nodes of equal resources; `count` is infinite for a node type without a maximum."""

    resources: Mapping[str, float]
    count: float

    def room_for(self, request: Request) -> float:
        """How many workers of a request its nodes hold when they are empty."""
        limits = [
            math.floor(self.resources.get(name, 0.0) / amount + _SLACK)
            for name, amount in (("CPU", request.cpu), ("GPU", request.gpu))
            if amount > 0
        ]
        return min(limits, default=math.inf) * self.count if self.count else 0.0


def check_feasible(requests: Sequence[Request]) -> None:
    """Raises UserError for a request that the cluster cannot fulfil even when it is empty and fully scaled up."""
    kinds = cluster_kinds()
    for request in requests:
        if sum(kind.room_for(request) for kind in kinds) < request.workers:
            biggest = max(
                (kind.resources for kind in kinds), key=lambda r: (r.get("GPU", 0), r.get("CPU", 0)), default={}
            )
            raise UserError(
                f"{request}, which this cluster can never give: its biggest node has {_amounts(biggest)} "
                f"and all together {_amounts(_sum(kinds))}; ask less (parts.<name>.workers, .resources) or use a larger one"
            )


def describe_wait(waiting: Sequence[Request]) -> str:
    """One line: who waits, what they ask, what is free."""
    asked = "; ".join(str(request) for request in waiting)
    return f"waiting: {asked}; free: {_amounts(ray.available_resources())} of {_amounts(ray.cluster_resources())}"


def cluster_kinds() -> list[NodeKind]:
    """Nodes that are there, and those that the cluster's autoscaler may add."""
    groups = _autoscaler_groups()
    present = [
        NodeKind(node["Resources"], 1.0)
        for node in ray.nodes()
        if node["Alive"] and node.get("Labels", {}).get("ray.io/node-group") not in groups
    ]
    return [*present, *groups.values()]


def _autoscaler_groups() -> dict[str, NodeKind]:
    from ray._private.state import state  # the only place where Ray tells its node types' maxima

    config: Any = state.get_cluster_config()
    if config is None:
        return {}
    return {
        group.name: NodeKind(dict(group.resources), math.inf if group.max_count < 0 else float(group.max_count))
        for group in config.node_group_configs
    }


def _sum(kinds: Sequence[NodeKind]) -> dict[str, float]:
    return {
        name: sum(kind.resources.get(name, 0.0) * kind.count for kind in kinds if kind.count) for name in ("CPU", "GPU")
    }


def _amounts(resources: Mapping[str, float]) -> str:
    gpus = f" and {resources['GPU']:g} GPU" if resources.get("GPU") else ""
    return f"{resources.get('CPU', 0.0):g} CPU{gpus}"
