"""Resources that trainings ask of a cluster: whether they can ever be had, and the line that is printed while not."""

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray_jobs.cluster.environment import starts_own_cluster  # first: Ray reads its variables when it is imported

# isort: split
import ray
from ray._private.resource_and_label_spec import ResourceAndLabelSpec
from ray.autoscaler.v2.schema import ClusterStatus
from ray.autoscaler.v2.sdk import get_cluster_status
from ray.util import placement_group_table

from dsmip.config import Workers
from dsmip.errors import UserError
from ray_jobs.cluster.node_types import configured_node_types

WAIT_LINE_SECONDS = 30.0
_SLACK = 1e-6  # fractions of CPUs are floats


@dataclass(frozen=True, slots=True)
class Request:
    """Workers that run at the same time.

    Attributes:
        cpu, gpu: Of each worker, on one node.
        most: More of them than `workers` are taken where there is room; 0: none.
    """

    name: str
    workers: int
    cpu: float
    gpu: float
    most: int = 0

    def __str__(self) -> str:
        workers = Workers(self.workers, max(self.workers, self.most))
        gpus = f" and {self.gpu:g} GPU" if self.gpu else ""
        return f"{self.name} asks {workers} worker{'s' * (workers.most > 1)} with {self.cpu:g} CPU{gpus} each"


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
        return _times(min(limits, default=math.inf), self.count)


def check_before_start(requests: Sequence[Request]) -> None:
    """As `check_feasible`, before a local cluster starts, which takes half a minute; of others nothing is known yet."""
    if starts_own_cluster() and not ray.is_initialized():
        _check(requests, [this_machine()])


def check_feasible(requests: Sequence[Request]) -> None:
    """Checks requests against the cluster.

    Raises:
        UserError: It cannot fulfil one even when it is empty and fully scaled up.
    """
    _check(requests, cluster_kinds())


def _check(requests: Sequence[Request], kinds: Sequence[NodeKind]) -> None:
    for request in requests:
        if sum(kind.room_for(request) for kind in kinds) < request.workers:
            biggest = max((kind.resources for kind in kinds if kind.count), key=_size, default={})
            raise UserError(
                f"{request}, which this cluster can never give: its biggest node has {_amounts(biggest)}, all together "
                f"have {_amounts(_sum(kinds))}; ask less (workers, resources) or use a larger cluster"
            )


def this_machine() -> NodeKind:
    """What a local cluster will have: Ray counts before it starts as it does when it starts."""
    return NodeKind(ResourceAndLabelSpec().resolve(is_head=True).to_resource_dict(), 1.0)


def describe_wait(waiting: Sequence[Request], seconds: float) -> str:
    """One line about workers that do not work yet.

    Those that have their room are starting. Of the others it says what they ask, what is free, and which nodes are
    awaited.

    Args:
        waiting: They ask.
        seconds: Since when.
    """
    try:
        status = get_cluster_status(ray.get_runtime_context().gcs_address)
        without = without_room(waiting, status)
        awaited = nodes_on_their_way(status) or "no node"
    except ray.exceptions.RayError:  # a busy head that does not answer in time must not end what runs
        without, awaited = [(len(waiting), list(waiting))], "unknown"
    starting = sum(each.workers for each in waiting)
    asks = []
    for count, alike in without:
        starting -= count * min(each.workers for each in alike)
        some = f"{count} of: " if count < len(alike) else ""
        asks.append(some + "; ".join(str(request) for request in alike))
    lines = []
    if starting > 0:
        workers = f"{starting} worker{'s' * (starting > 1)}"
        lines.append(f"starting {workers}: imports, weights, {seconds:.0f} s so far")
    if asks:
        free = f"{_amounts(ray.available_resources())} of {_amounts(ray.cluster_resources())}"
        lines.append(f"waiting to start: {'; '.join(asks)}; free: {free}; awaited: {awaited}")
    return "; ".join(lines)


def without_room(waiting: Sequence[Request], status: ClusterStatus) -> list[tuple[int, list[Request]]]:
    """Requests that the cluster has not fulfilled yet, those of equal workers together, and how many of them."""
    demands = status.resource_demands
    open_of: Counter[tuple[float, float]] = Counter()
    for group in demands.placement_group_demand:  # a training of a fixed number of workers
        open_of[_shape(group.bundles_by_count[0].bundle)] += 1
    for demand in demands.ray_task_actor_demand:
        for each in demand.bundles_by_count:
            open_of[_shape(each.bundle)] += each.count
    # That of a training with a range of workers stays when it has been fulfilled.
    asked = {_shape(each.bundle) for group in demands.cluster_constraint_demand for each in group.bundles_by_count}
    placed = {
        _shape(bundle)
        for group in placement_group_table().values()
        if group["state"] == "CREATED"
        for bundle in group["bundles"].values()
    }
    alike: dict[tuple[float, float], list[Request]] = {}
    for request in waiting:
        shape = _shape({"CPU": request.cpu, "GPU": request.gpu})
        elastic = request.most > request.workers and shape in asked - placed
        if open_of[shape] or elastic:
            alike.setdefault(shape, []).append(request)
    return [(min(open_of[shape], len(each)) or len(each), each) for shape, each in alike.items()]


def _shape(bundle: Mapping[str, float]) -> tuple[float, float]:
    return round(bundle.get("CPU", 0.0), 4), round(bundle.get("GPU", 0.0), 4)


def nodes_on_their_way(status: ClusterStatus) -> str:
    """Nodes that the autoscaler starts or failed to start, as `2 gpu nodes (1 cpu node failed to start)`; may be ''."""
    coming = Counter(node.ray_node_type_name for node in status.pending_nodes)
    failed: Counter[str] = Counter()
    for count, launches in ((coming, status.pending_launches), (failed, status.failed_launches)):
        for launch in launches:
            count[launch.ray_node_type_name] += launch.count
    return _nodes(coming) + (f" ({_nodes(failed)} failed to start)" if failed else "")


class WaitingLine:
    """Says every 30 seconds which of the given names have not started; call it often with those that have not."""

    def __init__(self, requests: Mapping[str, Request], say: Callable[[str], None]) -> None:
        self._requests, self._say = requests, say
        self._begun = time.monotonic()
        self._next = self._begun + WAIT_LINE_SECONDS

    def __call__(self, waiting: set[str]) -> None:
        now = time.monotonic()
        if now >= self._next:
            self._next += WAIT_LINE_SECONDS
            if waiting:
                requests = [self._requests[name] for name in sorted(waiting)]
                self._say(f"  {describe_wait(requests, now - self._begun)}")


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
    """Node types by name. One without resources (on-premise machines) tells nothing of what its nodes have."""
    from ray._private.state import state  # the only place where Ray tells its node types' maxima

    config: Any = state.get_cluster_config()  # written by managed platforms only
    if config is None:
        return _configured_groups()
    return {
        group.name: NodeKind(dict(group.resources), _most_nodes(group, config.max_resources))
        for group in config.node_group_configs
        if group.resources
    }


def _configured_groups() -> dict[str, NodeKind]:
    if starts_own_cluster():
        return {}
    return {
        name: NodeKind(kind.resources, math.inf if kind.max_workers is None else kind.max_workers)
        for name, kind in configured_node_types().items()
        if kind.resources
    }


def _most_nodes(group: Any, max_resources: Mapping[str, float]) -> float:
    """A node type's maximum (negative: none), lowered to what the whole cluster may have."""
    limits = [
        max_resources[name] // amount for name, amount in group.resources.items() if amount and name in max_resources
    ]
    return float(min(math.inf if group.max_count < 0 else group.max_count, *limits, math.inf))


def _nodes(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name} node{'s' * (count > 1)}" for name, count in sorted(counts.items()))


def _size(resources: Mapping[str, float]) -> tuple[float, float]:
    return resources.get("GPU", 0.0), resources.get("CPU", 0.0)


def _sum(kinds: Sequence[NodeKind]) -> dict[str, float]:
    return {name: sum(_times(kind.resources.get(name, 0.0), kind.count) for kind in kinds) for name in ("CPU", "GPU")}


def _times(amount: float, count: float) -> float:
    """The product; nothing of infinitely many is nothing (floats say nan, which is below no number)."""
    return amount * count if amount and count else 0.0


def _amounts(resources: Mapping[str, float]) -> str:
    gpus = f" and {_amount(resources['GPU'])} GPU" if resources.get("GPU") else ""
    return f"{_amount(resources.get('CPU', 0.0))} CPU{gpus}"


def _amount(number: float) -> str:
    return "unlimited" if number == math.inf else f"{number:g}"
