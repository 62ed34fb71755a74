"""The contract of a published system: how its parts and the whole of it are built from a configuration.

A system is made of parts that are trained one after the other or side by side; every part is itself a `Matcher`, or a
`Reranker` over what a matcher ranks best.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from dsmip.config import ExperimentConfig, Frozen
from dsmip.data.collate import ItemFormat
from dsmip.data.dataset import Dataset
from dsmip.encoders.architecture import build_tokenizer
from dsmip.encoders.base import FeatureEncoder, StoredFeatures
from dsmip.encoders.clip import Backbone
from dsmip.errors import UserError
from dsmip.units.matcher import Matcher, Reranker


class System(ABC):
    """What the registry holds: how a published system is built from a configuration.

    `part_names` are trained in stage one, each a `Matcher` of its own. `build_whole` scores from cached features of
    `feature_parts`, whose columns carry the part's name as prefix. `gated` systems have a stage two.

    Attributes:
        paper: Who published it, where and when.
        published_config: The shipped configuration with its published settings, of WikiMEL.
        fusions: Names of the fusions of its experts that have no gate and nothing to train but a scale per expert: they
            are evaluated beside the whole.
        published_sign: How a name begins that only this system's released checkpoints have; empty: none are known.
        released_with: `key=value` that a released checkpoint was trained with and `published_config` has otherwise.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    published_config: ClassVar[str]
    published_sign: ClassVar[str] = ""
    released_with: ClassVar[tuple[str, ...]] = ()
    fusions: ClassVar[tuple[str, ...]] = ()
    config_class: ClassVar[type[Frozen]]
    gated: ClassVar[bool]

    @classmethod
    @abstractmethod
    def part_names(cls, section: Any) -> tuple[str, ...]:
        """Names of the stage-one parts under a validated `system` section."""

    @classmethod
    def rerankers(cls, section: Any) -> Mapping[str, str]:
        """Parts that score a mention and an entity together, each with the part whose best entities it re-ranks.

        They are trained after that part. A system with one is ranked as a whole under its own name.
        """
        return {}

    @classmethod
    def num_candidates(cls, section: Any) -> int:
        """How many entities of a first stage are re-ranked."""
        return 0

    @classmethod
    def build_reranker(cls, part: str, config: ExperimentConfig) -> Reranker:
        """A part of `rerankers`, with its towers."""
        raise RuntimeError(f"{cls.name} has no re-ranker")

    @classmethod
    @abstractmethod
    def feature_parts(cls, section: Any) -> tuple[str, ...]:
        """Whose features the whole system scores from."""

    @classmethod
    @abstractmethod
    def choices(cls, section: Any) -> tuple[str, ...]:
        """What `Scores.chosen_ME` indexes, in order; empty for a system that makes no choice."""

    @classmethod
    def part_key(cls, part: str, config: ExperimentConfig) -> str:
        """What a part's stage one depends on, as a text: equal texts mean the same trained part.

        A part of other settings lies in a folder named by its hash: write it out, see `dsmip.keys`.
        """
        return ""

    @classmethod
    @abstractmethod
    def item_format(cls, section: Any, part: str) -> ItemFormat:
        """Templates and token limit of a feature part's texts."""

    @classmethod
    def check(cls, config: ExperimentConfig, backbone: Backbone) -> None:
        """Checks settings of parts against the towers, before anything is built with weights.

        Args:
            config: Of the run, or of a trial.
            backbone: Its towers; on the device meta will do.

        Raises:
            UserError: The towers cannot hold what is asked of them.
        """
        for part in dict.fromkeys((*cls.part_names(config.system), *cls.feature_parts(config.system))):
            form, room = cls.item_format(config.system, part), backbone.context_length
            for modality, tower in (("text", backbone.text), ("image", backbone.vision)):
                if modality in form.of_either and tower.is_absent:
                    read, key = ("texts", "text: hf:") if modality == "text" else ("pictures", "vision: timm:")
                    raise UserError(
                        f"{part} reads {read}, and backbone {config.backbone.architecture} has no {tower.name} tower: "
                        f"add one ({key}<name>), or take a system that reads none"
                    )
            if form.word_places and not form.template.has_words:
                raise UserError(
                    f"{part} pools the tokens of a mention's word and of an entity's name: system.template.mention "
                    "must have {word}, system.template.entity {name}"
                )
            if form.markers:
                build_tokenizer(config.backbone.architecture, form.markers)
            if form.reserve > room - 3:  # start of text, a token, end of text
                raise UserError(
                    f"{part}: {form.reserve} prompts leave no room for a text in the {room} positions of "
                    f"{config.backbone.architecture}; at most {room - 3} do"
                )
            if (form.num_tokens or 0) + form.reserve > room:
                raise UserError(
                    f"{part}: texts of {form.num_tokens} tokens and {form.reserve} prompts exceed the {room} positions "
                    f"of {config.backbone.architecture}"
                )
            if backbone.text.reads_padding and form.num_tokens and form.num_tokens + form.reserve < room:
                raise UserError(
                    f"{part}: texts of {form.num_tokens} tokens do not fill the {room} positions, which the text tower "
                    f"of {config.backbone.architecture} reads whole: set system.num_tokens to {room - form.reserve}"
                )

    @classmethod
    def why_not_trained(cls, section: Any) -> str | None:
        """Why settings only rank, with weights that come trained; None: they can be trained."""
        return None

    @classmethod
    @abstractmethod
    def build_part(cls, part: str, config: ExperimentConfig, *, with_encoder: bool) -> Matcher:
        """One part, with its towers or (for cached features) without."""

    @classmethod
    @abstractmethod
    def build_encoder(cls, part: str, config: ExperimentConfig) -> FeatureEncoder:
        """The encoder of one of `feature_parts`, weights not yet loaded."""

    @classmethod
    def stored_features(cls, part: str, config: ExperimentConfig, dataset: Dataset) -> StoredFeatures | None:
        """What of a feature part was computed beside the shards; None: nothing, all is to be encoded."""
        return None

    @classmethod
    def build_fusion(cls, name: str, config: ExperimentConfig) -> Matcher:
        """One of `fusions`, without its experts' weights and scales."""
        raise RuntimeError(f"{cls.name} has no fusion {name}")

    @classmethod
    @abstractmethod
    def build_whole(cls, config: ExperimentConfig) -> Matcher:
        """The whole system on cached features, without towers."""


class OnePartSystem(System):
    """A system of one part, which has the system's name and, without its towers, is the whole: there is no gate."""

    gated: ClassVar[bool] = False

    @classmethod
    def part_names(cls, section: Any) -> tuple[str, ...]:
        return (cls.name,)

    @classmethod
    def feature_parts(cls, section: Any) -> tuple[str, ...]:
        return (cls.name,)

    @classmethod
    def choices(cls, section: Any) -> tuple[str, ...]:
        return ()

    @classmethod
    def build_encoder(cls, part: str, config: ExperimentConfig) -> FeatureEncoder:
        return cls.build_part(part, config, with_encoder=True)

    @classmethod
    def build_whole(cls, config: ExperimentConfig) -> Matcher:
        """The part without its towers: it scores the part's features as they are, without a prefix."""
        return cls.build_part(cls.name, config, with_encoder=False)
