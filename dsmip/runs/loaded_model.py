"""A loaded model of a run, and which ones a configuration has."""

from dataclasses import dataclass

from dsmip.config import ExperimentConfig
from dsmip.models import find_system
from dsmip.units.matcher import Matcher


@dataclass(frozen=True)
class LoadedModel:
    """A finished part of a run, or its gated whole, that scores cached features.

    Attributes:
        name: the part's or the system's.
        matcher: with its trained weights, on the CPU.
        config: the run's, or what the best trial of stage two chose.
        choices: the experts that it chooses from (may be none).
        feature_parts: whose features it reads; of several, each under its part's name.
        reranker: the part that scores its best entities once more; None: its ranking is the model's.
    """

    name: str
    matcher: Matcher
    config: ExperimentConfig
    choices: tuple[str, ...]
    feature_parts: tuple[str, ...]
    reranker: str | None = None

    @property
    def ranked_by(self) -> str:
        """The model that makes its ranking over the whole knowledge base, whose index is read."""
        return self.name if self.reranker is None else self.feature_parts[0]


def model_names(config: ExperimentConfig) -> tuple[str, ...]:
    """What can be evaluated: a gated or re-ranked whole first, then every part that ranks alone."""
    system = find_system(config.model)
    rerankers = system.rerankers(config.system)
    alone = [part for part in system.part_names(config.system) if part not in rerankers]
    return (*([system.name] if system.gated or rerankers else []), *alone)
