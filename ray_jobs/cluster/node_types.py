"""Node types that an autoscaler may add. Ray does not tell them to a job, so they are read where they were configured.

On a head that `ray up` started they are in a file of the home folder, and a job's driver runs on the head. Elsewhere
(KubeRay) the variable DSMIP_NODE_TYPES holds them, in the form of a cluster file's `available_node_types`.
"""

import os
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from dsmip.errors import UserError
from dsmip.storage.parsing import parse_yaml

VARIABLE = "DSMIP_NODE_TYPES"
_CLUSTER_FILE = Path("~/ray_bootstrap_config.yaml")


class _NodeConfig(BaseModel):
    InstanceType: str = ""


class NodeType(BaseModel):
    """Resources of one node, and how many there may be (None: no maximum)."""

    resources: dict[str, float] = {}
    max_workers: int | None = Field(None, ge=0)
    node_config: _NodeConfig = _NodeConfig()

    @property
    def machine(self) -> str:
        """What the provider calls such a machine; empty where nobody says."""
        return self.node_config.InstanceType


class _Cluster(BaseModel):
    max_workers: int | None = Field(None, ge=0)
    head_node_type: str = ""
    available_node_types: dict[str, NodeType] = {}


def configured_node_types() -> Mapping[str, NodeType]:
    """Worker node types by name; none where there is no autoscaler.

    Raises:
        UserError: When they cannot be read.
    """
    path = _CLUSTER_FILE.expanduser()
    try:
        if text := os.environ.get(VARIABLE):
            return TypeAdapter(dict[str, NodeType]).validate_python(parse_yaml(text, f"the variable {VARIABLE}"))
    except (ValueError, ValidationError) as error:
        raise UserError(f"the variable {VARIABLE} does not hold a cluster's node types: {error}") from error
    return node_types_of(path) if path.is_file() else {}


def node_types_of(path: Path) -> Mapping[str, NodeType]:
    """Worker node types by name that a cluster file describes.

    Raises:
        UserError: It cannot be read.
    """
    try:
        cluster = _Cluster.model_validate(parse_yaml(path.read_text(encoding="utf-8"), str(path)))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, ValidationError) as error:
        raise UserError(f"{path} does not hold a cluster's node types: {' '.join(str(error).split())}") from error
    return {
        name: kind.model_copy(update={"max_workers": _lower(kind.max_workers, cluster.max_workers)})
        for name, kind in cluster.available_node_types.items()
        if name != cluster.head_node_type
    }


def _lower(*maxima: int | None) -> int | None:
    """Of a node type's maximum and the whole cluster's; None: none."""
    return min((most for most in maxima if most is not None), default=None)
