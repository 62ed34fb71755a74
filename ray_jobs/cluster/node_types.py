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


class NodeType(BaseModel):
    """Resources of one node, and how many there may be (None: no maximum)."""

    resources: dict[str, float] = {}
    max_workers: int | None = Field(None, ge=0)


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
        if not path.is_file():
            return {}
        cluster = _Cluster.model_validate(parse_yaml(path.read_text(encoding="utf-8"), str(path)))
    except (OSError, ValueError, ValidationError) as error:
        where = f"the variable {VARIABLE}" if os.environ.get(VARIABLE) else path
        raise UserError(f"{where} does not hold a cluster's node types: {error}") from error
    return {
        name: kind.model_copy(update={"max_workers": _lower(kind.max_workers, cluster.max_workers)})
        for name, kind in cluster.available_node_types.items()
        if name != cluster.head_node_type
    }


def _lower(*maxima: int | None) -> int | None:
    """Of a node type's maximum and the whole cluster's; None: none."""
    return min((most for most in maxima if most is not None), default=None)
