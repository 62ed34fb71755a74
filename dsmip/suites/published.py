"""Published figures, each with its source and the protocol that it was measured by."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from dsmip.evaluation.metrics import METRICS
from dsmip.evaluation.stored.protocol import EvaluationProtocol
from dsmip.storage.parsing import parse_yaml

_PERCENT = 100.0


@dataclass(frozen=True, slots=True)
class Source:
    """Where a figure is printed.

    Attributes:
        protocol: How it was measured, by keys of our own protocol and further ones.
    """

    name: str
    cite: str
    protocol: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Published:
    """What was printed of a system on a data set.

    Attributes:
        entities: In the knowledge base of the data set.
        figures: By metric, as ours are: hits between 0 and 1.
    """

    source: Source
    entities: int
    figures: Mapping[str, float]

    def differences(self, ours: EvaluationProtocol) -> list[str]:
        """What keeps a figure of ours from being compared with it, in words."""
        theirs: dict[str, Any] = {"entities": self.entities, **self.source.protocol}
        own: dict[str, Any] = {"entities": ours.entities, "ranked": ours.ranked, **ours.texts}
        if "mention_desc" in ours.texts:
            theirs.setdefault("mention_desc", "nothing")
        compared = [name for name in theirs if name in own]
        return [f"{name} is {own[name]}, there {theirs[name]}" for name in compared if own[name] != theirs[name]]


@cache
def published_figures() -> Mapping[tuple[str, str], Published]:
    """By row of a suite and data set."""
    tree = _tree()
    found = {}
    for entry in tree["figures"]:
        figures = {
            name: value / _PERCENT if METRICS[name].is_bounded else float(value)
            for name, value in entry.items()
            if name in METRICS
        }
        source = _sources()[entry["source"]]
        found[entry["system"], entry["data"]] = Published(source, tree["entities"][entry["data"]], figures)
    return found


@cache
def published_parameters() -> Mapping[str, tuple[float, Source]]:
    """Millions of trained parameters, by row of a suite."""
    return {entry["row"]: (float(entry["millions"]), _sources()[entry["source"]]) for entry in _tree()["parameters"]}


@cache
def _sources() -> Mapping[str, Source]:
    return {name: Source(name, about["cite"], about["protocol"]) for name, about in _tree()["sources"].items()}


@cache
def _tree() -> Any:
    text = resources.files("dsmip.suites").joinpath("published.yaml").read_text(encoding="utf-8")
    return parse_yaml(text, "published.yaml")
