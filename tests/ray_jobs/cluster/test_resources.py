"""What a cluster can give: whole workers on whole nodes, those that its autoscaler may add included."""

import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray._private.state import state
from ray.autoscaler.v2.schema import (
    ClusterConstraintDemand,
    ClusterStatus,
    LaunchRequest,
    NodeInfo,
    PlacementGroupResourceDemand,
    RayTaskActorDemand,
    ResourceDemandSummary,
    ResourceRequestByCount,
)
from ray.core.generated.autoscaler_pb2 import ClusterConfig  # type: ignore[attr-defined]  # a generated module

from dsmip.errors import UserError
from ray_jobs.cluster import resources
from ray_jobs.cluster.node_types import VARIABLE
from ray_jobs.cluster.resources import (
    NodeKind,
    Request,
    check_before_start,
    check_feasible,
    describe_wait,
    nodes_on_their_way,
)
from tests.support.paths import ROOT

TWO_SMALL = [NodeKind({"CPU": 2.0}, 1.0), NodeKind({"CPU": 2.0, "GPU": 1.0}, 1.0)]
UNLIMITED = [NodeKind({"CPU": 4.0}, math.inf)]  # a node type without a maximum
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
        (UNLIMITED, Request("x", 1000, 4, 0), True),
        (UNLIMITED, Request("x", 1, 1, 1), False),
        (UNLIMITED, Request("x", 1, 5, 0), False),
        ([*UNLIMITED, *TWO_SMALL], Request("x", 1, 1, 1), True),
        ([*UNLIMITED, *TWO_SMALL], Request("x", 2, 1, 1), False),
    ],
)
def test_what_fits(monkeypatch: pytest.MonkeyPatch, kinds: list[NodeKind], request_: Request, fits: bool) -> None:
    monkeypatch.setattr(resources, "cluster_kinds", lambda: kinds)
    if fits:
        check_feasible([request_])
        return
    with pytest.raises(UserError, match=r"x asks .* which this cluster can never give"):
        check_feasible([Request("small", 1, 0.1, 0), request_])


def test_a_local_cluster_is_asked_before_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is known yet of one that is joined, nor asked of one that this process is connected to."""
    monkeypatch.setenv("RAY_OVERRIDE_RESOURCES", '{"CPU": 3, "GPU": 1}')
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    check_before_start([Request("x", 3, 1, 0), Request("y", 1, 3, 1)])
    with pytest.raises(UserError, match=r"x asks 2 workers with 2 CPU each, which .* biggest node has 3 CPU and 1 GPU"):
        check_before_start([Request("x", 2, 2, 0)])
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    check_before_start([Request("x", 200, 2, 0)])
    monkeypatch.delenv("RAY_ADDRESS")
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    check_before_start([Request("x", 200, 2, 0)])


def test_the_message_says_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "cluster_kinds", lambda: TWO_SMALL)
    with pytest.raises(UserError, match=r"3 workers with 9 CPU and 2 GPU.*biggest node has 2 CPU and 1 GPU.*4 CPU"):
        check_feasible([Request("visual", 3, 9, 2)])
    monkeypatch.setattr(resources, "cluster_kinds", lambda: [*UNLIMITED, *TWO_SMALL])
    with pytest.raises(UserError, match=r"all together have unlimited CPU and 1 GPU;"):
        check_feasible([Request("visual", 2, 1, 1)])


def test_the_autoscalers_limits_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A node type's maximum (-1: none), and the most that the whole cluster may have of a resource."""
    config = ClusterConfig(max_resources={"CPU": 20, "TPU": 0})
    groups = {"cpu": ({"CPU": 8, "memory": 1 << 30}, -1), "gpu": ({"CPU": 4, "GPU": 2}, 3), "big": ({"CPU": 64}, 5)}
    for name, (amounts, most) in groups.items():
        config.node_group_configs.add(name=name, resources=amounts, max_count=most)
    labels = {"ray.io/node-group": "cpu"}
    nodes = [{"Alive": True, "Resources": {"CPU": 1.0}}, {"Alive": True, "Resources": {"CPU": 8.0}, "Labels": labels}]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(state, "get_cluster_config", lambda: config)
    head, *kinds = resources.cluster_kinds()
    assert (head.resources, head.count) == ({"CPU": 1.0}, 1)
    assert [kind.count for kind in kinds] == [2, 3, 0]
    del config.max_resources["CPU"]
    assert [kind.count for kind in resources.cluster_kinds()] == [1, math.inf, 3, 5]
    config.node_group_configs.add(
        name="local.cluster.node", max_count=2
    )  # on-premise: only its nodes tell what they have
    nodes.append({"Alive": True, "Resources": {"CPU": 3.0}, "Labels": {"ray.io/node-group": "local.cluster.node"}})
    assert [kind.resources for kind in resources.cluster_kinds()][:2] == [{"CPU": 1.0}, {"CPU": 3.0}]


def test_nodes_on_their_way_are_counted_by_their_type() -> None:
    def node(kind: str) -> NodeInfo:
        return NodeInfo("m6i", kind, "i-1", "")

    def launch(kind: str, count: int, state: LaunchRequest.Status) -> LaunchRequest:
        return LaunchRequest("m6i", kind, count, state, request_ts_s=0)

    pending, failed = LaunchRequest.Status.PENDING, LaunchRequest.Status.FAILED
    assert nodes_on_their_way(ClusterStatus()) == ""
    status = ClusterStatus(
        pending_nodes=[node("gpu")], pending_launches=[launch("gpu", 1, pending), launch("cpu", 1, pending)]
    )
    assert nodes_on_their_way(status) == "1 cpu node, 2 gpu nodes"
    status.failed_launches.append(launch("gpu", 3, failed))
    assert nodes_on_their_way(status) == "1 cpu node, 2 gpu nodes (3 gpu nodes failed to start)"


def test_a_head_that_gives_no_answer_ends_no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_answer(address: str) -> ClusterStatus:
        raise ray.exceptions.RpcError("Deadline Exceeded")

    monkeypatch.setattr(ray, "available_resources", dict)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0})
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address="127.0.0.1:1"))
    monkeypatch.setattr(resources, "get_cluster_status", no_answer)
    said = describe_wait([Request("visual", 1, 1, 0)], 30.0)
    assert said.endswith("free: 0 CPU of 4 CPU; awaited: unknown")


def test_workers_that_have_their_room_are_starting(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the cluster has not fulfilled tells them from those that wait; of equal ones it tells how many."""
    tables: dict[str, Any] = {}
    status = ClusterStatus()
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 1.0})
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0})
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address=""))
    monkeypatch.setattr(resources, "get_cluster_status", lambda address: status)
    monkeypatch.setattr(resources, "placement_group_table", lambda: tables)
    text, visual = Request("text", 2, 0.6, 0), Request("visual", 2, 0.6, 0)
    elastic, task = Request("multimodal", 1, 2, 0, most=4), Request("text features", 1, 1, 0)
    assert describe_wait([text], 60.2) == "starting 2 workers: imports, weights, 60 s so far"

    of_training = [ResourceRequestByCount({"CPU": 0.6}, 2)]
    status.resource_demands.placement_group_demand = [PlacementGroupResourceDemand(of_training, "")]
    free = "; free: 1 CPU of 4 CPU; awaited: no node"
    asks = "text asks 2 workers with 0.6 CPU each"
    assert describe_wait([text], 60) == f"waiting to start: {asks}{free}"
    both = f"1 of: {asks}; visual asks 2 workers with 0.6 CPU each"
    starting = "starting 2 workers: imports, weights, 60 s so far; "
    assert describe_wait([text, visual], 60) == f"{starting}waiting to start: {both}{free}"

    status.resource_demands = ResourceDemandSummary(
        ray_task_actor_demand=[RayTaskActorDemand([ResourceRequestByCount({"CPU": 1.0}, 1)])],
        cluster_constraint_demand=[ClusterConstraintDemand([ResourceRequestByCount({"CPU": 2.0}, 4)])],
    )
    assert describe_wait([task], 5) == f"waiting to start: text features asks 1 worker with 1 CPU each{free}"
    assert describe_wait([elastic], 5) == f"waiting to start: multimodal asks 1..4 workers with 2 CPU each{free}"
    tables["a"] = {"state": "CREATED", "bundles": {0: {"CPU": 2.0}}}
    assert describe_wait([elastic], 5) == "starting 1 worker: imports, weights, 5 s so far"


def test_node_types_are_read_where_they_were_configured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """From the file of `ray up` on a head, or from the variable; never for a cluster of this process."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(ray, "nodes", list)
    monkeypatch.setattr(state, "get_cluster_config", lambda: None)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert resources.cluster_kinds() == []
    shutil.copy(ROOT / "cluster.yaml", tmp_path / "ray_bootstrap_config.yaml")
    assert resources.cluster_kinds() == [NodeKind({"CPU": 16}, 8), NodeKind({"CPU": 8, "GPU": 1}, 4)]
    path = tmp_path / "ray_bootstrap_config.yaml"
    path.write_text(path.read_text().replace("\nmax_workers: 12 ", "\nmax_workers: 2 "))  # the whole cluster's
    assert [kind.count for kind in resources.cluster_kinds()] == [2, 2]
    with pytest.raises(UserError, match=r"asks 3 workers .* which this cluster can never give"):
        check_feasible([Request("visual", 3, 1, 1)])
    monkeypatch.setenv(VARIABLE, "{small: {resources: {CPU: 2}, max_workers: 3}, any: {resources: {CPU: 1}}}")
    assert resources.cluster_kinds() == [NodeKind({"CPU": 2}, 3), NodeKind({"CPU": 1}, math.inf)]
    monkeypatch.setenv(VARIABLE, "{small: 3}")
    with pytest.raises(UserError, match="the variable DSMIP_NODE_TYPES does not hold"):
        resources.cluster_kinds()
    monkeypatch.delenv("RAY_ADDRESS")
    assert resources.cluster_kinds() == []
