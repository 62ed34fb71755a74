"""The trained parts of a run or a bundle, the models that are loaded from them, and which ones a configuration has."""

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch

from dsmip.config import ExperimentConfig
from dsmip.data.collate import Collator, ItemFormat
from dsmip.encoders.architecture import build_tokenizer, resolve_architecture
from dsmip.encoders.base import FeatureEncoder
from dsmip.errors import UserError
from dsmip.models import find_system
from dsmip.models.base import System
from dsmip.runs.load_config import load_config
from dsmip.runs.weights import load_own_weights
from dsmip.storage.locations import Location, open_run_storage
from dsmip.storage.parsing import read_json
from dsmip.storage.run_storage import RunStorage
from dsmip.units.matcher import Matcher, Reranker

CONFIG, PART, WEIGHTS = "config.yaml", "part.json", "weights.safetensors"
_DTYPES = {"float32": torch.float32, "float16": torch.float16}


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
        fusion: it is one of `System.fusions`.
    """

    name: str
    matcher: Matcher
    config: ExperimentConfig
    choices: tuple[str, ...]
    feature_parts: tuple[str, ...]
    reranker: str | None = None
    fusion: bool = False

    @property
    def ranked_by(self) -> str:
        """Whose index is read: the model that makes its ranking over the whole knowledge base; all fusions have one."""
        if self.fusion:
            return "fusion"
        return self.name if self.reranker is None else self.feature_parts[0]


@dataclass(frozen=True)
class TrainedParts:
    """Finished parts of a system and how they are loaded. `at`: where they lie.

    <at>/<part>/weights.safetensors   a finished part (or whole system), with part.json (metrics, history) last
    <at>/<system>/config.yaml         what the best trial of stage two chose
    <at>/variants/<hash>/             parts of other stage-one settings that it asked for
    """

    at: Location
    config: ExperimentConfig

    @cached_property
    def storage(self) -> RunStorage:
        return open_run_storage(self.at)

    @property
    def folder(self) -> Path:
        """Where its files are worked on, on this node."""
        return self.storage.folder

    @property
    def system(self) -> type[System]:
        return find_system(self.config.model)

    @property
    def part_names(self) -> tuple[str, ...]:
        return self.system.part_names(self.config.system)

    @property
    def feature_dtype(self) -> torch.dtype:
        """In which features are kept."""
        return _DTYPES[self.config.cache_dtype]

    def collator(self, part: str) -> Collator:
        """Makes batches in the form that a feature part reads."""
        return self.collator_of(self.system.item_format(self.config.system, part))

    def collator_of(self, item_format: ItemFormat) -> Collator:
        """Makes batches of that form."""
        network = resolve_architecture(self.config.backbone.architecture)
        if item_format.pixels is None:
            item_format = replace(item_format, pixels=network.pixels)
        return Collator(build_tokenizer(network.name, item_format.markers), item_format, network.image_size)

    def home(self, part: str, config: ExperimentConfig) -> Self:
        """Where a part of that form lives: this run, or its variant with another stage one (a tuned prompt length)."""
        key = self.system.part_key(part, config)
        if key == self.system.part_key(part, self.config):
            return self
        name = hashlib.sha256(key.encode()).hexdigest()[:16]
        return replace(self, at=self.storage / f"variants/{name}", config=config)

    def is_finished(self, part: str) -> bool:
        """Whether a part (or the whole system, by its name) has been trained to the end."""
        return self.has_file(self.folder / part / PART)

    def has_file(self, path: Path) -> bool:
        """Whether a file, which need not be there, is one of the parts'."""
        return path.is_file()

    def part_report(self, part: str) -> dict[str, Any]:
        """What training said of a finished part: best metrics and history."""
        self._check_finished(part)
        remedy = f"; remove {self.folder / part} and run the command that made it again"
        return read_json(self.folder / part / PART, dict, remedy)

    def load_part(self, part: str, *, with_encoder: bool) -> Matcher:
        """A finished part with its trained weights, on the CPU."""
        self._check_finished(part)
        matcher = self.system.build_part(part, self.config, with_encoder=with_encoder)
        load_own_weights(matcher, self._weights(part))
        return matcher

    def load_reranker(self, part: str) -> Reranker:
        """A finished re-ranker with its trained weights, on the CPU."""
        self._check_finished(part)
        reranker = self.system.build_reranker(part, self.config)
        load_own_weights(reranker, self._weights(part))
        return reranker

    def load_encoder(self, part: str, config: ExperimentConfig) -> FeatureEncoder:
        """What makes a feature part's features, on the CPU: a finished part, or else what `config` says of it."""
        if part in self.part_names:
            return self.load_part(part, with_encoder=True)
        return self.system.build_encoder(part, config)

    def load_whole(self, config: ExperimentConfig | None = None) -> Matcher:
        """The finished gated system, for cached features."""
        self._check_finished(self.system.name)
        matcher = self.system.build_whole(config or self.whole_config())
        load_own_weights(matcher, self._weights(self.system.name))
        return matcher

    def load_model(self, name: str) -> LoadedModel:
        """A finished part, or the gated whole by the system's name.

        Raises:
            UserError: An unknown model, or one that is not trained yet.
        """
        if name == self.system.name and self.system.gated:
            config = self.whole_config()
            section = config.system
            return LoadedModel(
                name, self.load_whole(), config, self.system.choices(section), self.system.feature_parts(section)
            )
        if name in self.system.fusions:
            config, choices = self.whole_config(), self.system.choices(self.whole_config().system)
            return LoadedModel(name, self.load_fusion(name), config, (), choices, fusion=True)
        if name in model_names(self.config):
            rerankers = self.system.rerankers(self.config.system)
            reranker, first = next(iter(rerankers.items())) if name == self.system.name and rerankers else (None, name)
            return LoadedModel(name, self.load_part(first, with_encoder=False), self.config, (), (first,), reranker)
        raise UserError(f"unknown model '{name}'; this run has {', '.join(evaluated_names(self.config))}")

    def load_fusion(self, name: str) -> Matcher:
        """A fusion of the experts that the gated whole chooses from, with their trained weights and fitted scales."""
        config, report = self.whole_config(), self.part_report(self.system.name)
        if "fusion" not in report:
            raise UserError(
                f"run {self.storage} was tuned by a version that fitted no scales; delete {self.storage}/tune and "
                f"{self.storage}/{self.system.name} and run 'dsmip tune' again"
            )
        matcher = self.build_fusion(name, config)
        scales = {expert: float(scale) for expert, scale in report["fusion"]["scale"].items()}
        matcher.get_buffer("scale_B").copy_(torch.tensor([scales[each] for each in self.system.choices(config.system)]))
        return matcher

    def build_fusion(self, name: str, config: ExperimentConfig) -> Matcher:
        """As `load_fusion`, with scales that are not fitted yet."""
        matcher = self.system.build_fusion(name, config)
        self.load_experts(matcher, config)
        return matcher

    def load_experts(self, matcher: Matcher, config: ExperimentConfig) -> None:
        """Puts the trained experts' units into a whole system or a fusion.

        Raises:
            UserError: An expert is not trained yet.
        """
        for part in self.system.choices(config.system):
            expert = self.home(part, config).load_part(part, with_encoder=False)
            matcher.get_submodule(f"experts.{part}").load_state_dict(expert.state_dict())

    def whole_config(self) -> ExperimentConfig:
        """The configuration that the best trial chose (temperature, gate width, experts ...)."""
        path = self.folder / self.system.name / CONFIG
        return self.stored_config(path) if self.has_file(path) else self.config

    def stored_config(self, path: Path) -> ExperimentConfig:
        """A configuration that is stored with the parts."""
        return load_config(str(path))

    def _check_finished(self, part: str) -> None:
        if not self.is_finished(part):
            command = "tune" if part == self.system.name and self.system.gated else "train"
            raise UserError(f"run {self.storage} has no finished '{part}'; run 'dsmip {command}' first")

    def _weights(self, part: str) -> Path:
        self.storage.pull(f"{part}/{WEIGHTS}")
        return self.folder / part / WEIGHTS


def model_names(config: ExperimentConfig) -> tuple[str, ...]:
    """What can be evaluated: a gated or re-ranked whole first, then every part that ranks alone."""
    system = find_system(config.model)
    rerankers = system.rerankers(config.system)
    alone = [part for part in system.part_names(config.system) if part not in rerankers]
    return (*([system.name] if system.gated or rerankers else []), *alone)


def evaluated_names(config: ExperimentConfig) -> tuple[str, ...]:
    """Whatever `dsmip evaluate` takes: `model_names`, then the fusions of a gated system's experts."""
    return (*model_names(config), *find_system(config.model).fusions)
