"""The modality selection gating network (DSMIP section 3.3, eqs. 15-16).

Each side's input is [text feature ; picture feature], both frozen. The paper's last layer over [h_m ; h_e] is split
into one part per side, so that a pair costs B additions: M mentions, E entities, B experts.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from dsmip.config import BackboneConfig, Frozen
from dsmip.data.collate import ItemBatch
from dsmip.data.dataset import Dataset
from dsmip.data.images import PixelForm
from dsmip.data.table import Table
from dsmip.encoders.architecture import resolve_architecture
from dsmip.encoders.base import FeatureSizes
from dsmip.encoders.clip import Backbone
from dsmip.encoders.feature_keys import tower_form
from dsmip.encoders.image_features import DTypeName, ImageFeatures, Weights, find_features, network_hash
from dsmip.encoders.image_networks import ClipImage, Kind, NetworkChoice, find_network
from dsmip.encoders.vgg import BY_HASH, RANDOM
from dsmip.errors import UserError
from dsmip.keys import plain_text
from dsmip.units.fusion.matcher import ScoringName

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "paper": {
        "inputs": "raw",
        "scoring": "choice",
        "choice": "pair",
        "training": "sampled",
        "calibration": "none",
        "units": "tuned",
        "final_activation": "relu",
    },
    "confidence": {
        "inputs": "confidence",
        "scoring": "mixture",
        "choice": "mention",
        "training": "mixture",
        "calibration": "fitted",
        "units": "frozen",
        "final_activation": "none",
        "width": 32,
        "dropout": 0.3,
    },
}
"""Forms of the gate by name, which `gate.preset` may be written for."""
_HASH = re.compile(rf"{BY_HASH}[0-9a-f]{{16,64}}")
_SMALLEST_VARIANCE = 1e-10  # means of token embeddings vary by thousandths: the usual 1e-5 would swallow them


class GateConfig(Frozen):
    """The gate's form: a `preset` sets the keys that PRESETS has for it, whatever else is given for them.

    A gate that fuses (`fuses`) learns from the experts' probabilities over the whole knowledge base, and scores pairs
    in two passes; any other learns from batches.

    Attributes:
        picture: The image network (`dsmip.encoders.image_networks`): `vgg16` (fc7) or `clip` (the frozen backbone's
            pooled picture).
        vgg_weights: Of an image network other than the backbone: a local file, `torchvision`, or `sha256:<16 or more
            digits>`: features that `dsmip features` has made. `random` draws them, to try what the network costs.
        text: The mean of the frozen text tower's input `embeddings`, or what the `tower` says of the whole text.
        inputs: What the gate sees: text and picture features `raw`, or `normalised` to mean 0 and variance 1 per number
            (means of token embeddings are tiny and nearly the same for all texts: raw, the gate does not see them);
            `confidence`, how sure each expert is of its answer (`dsmip.ops.experts.statistics.confidence`, normalised),
            or `both`.
        scoring: Scores of the expert of `choice`; `mixture`, the log likelihood under all experts' softmaxes over the
            whole kb, weighted; or `product`, the weighted sum of their log probabilities.
        choice: Every `pair` chooses its expert, or every `mention`, so that all entities of a ranking are scored on one
            scale.
        training: `sampled` one-hot choices with straight-through gradients (eqs. 15, 16), or `mixture`, the exact
            likelihood of a mixture of the experts (mention choice only); of their product where that is the scoring.
        calibration: `none`; a learned `scale` of each expert's scores, since experts that were trained alone differ
            in how sure they are of themselves; or one `fitted` before the gate is trained, under which the golds that
            stage two trains on are likeliest (of a gate that fuses).
        units: The experts' units are `tuned` with the gate (the paper) or `frozen`; `projections_frozen`: what maps
            pictures to the units' width stays as stage one left it, as if it were of the encoders.
        mlp: `two`, one for mentions and one for entities, or one that is `shared` (where every pair chooses).
    """

    added: ClassVar[Mapping[str, Any]] = {"scoring": "choice", "text": "embeddings", "mlp": "two"}
    short_for: ClassVar[tuple[str, ...]] = ("preset",)

    picture: Kind = "vgg16"
    vgg_weights: str = "torchvision"
    text: Literal["embeddings", "tower"] = "embeddings"
    inputs: Literal["raw", "normalised", "confidence", "both"] = "raw"
    scoring: ScoringName = "choice"
    choice: Literal["pair", "mention"] = "pair"
    training: Literal["sampled", "mixture"] = "sampled"
    calibration: Literal["none", "scale", "fitted"] = "none"
    units: Literal["tuned", "projections_frozen", "frozen"] = "tuned"
    mlp: Literal["two", "shared"] = "two"
    final_activation: Literal["relu", "none"] = "none"
    width: int = Field(512, ge=1)
    dropout: float = Field(0.1, ge=0, lt=1)
    temperature: float = Field(0.1, gt=0)

    @property
    def fuses(self) -> bool:
        """Whether the experts' probabilities over the whole kb have a part in it."""
        return self.sees_confidence or self.scoring != "choice" or self.calibration == "fitted"

    def text_width(self, sizes: FeatureSizes) -> int:
        """Of the gate's text feature."""
        return sizes.text_width if self.text == "embeddings" else sizes.embed_width

    @property
    def sees_confidence(self) -> bool:
        return self.inputs in ("confidence", "both")

    @property
    def sees_items(self) -> bool:
        return self.inputs != "confidence"

    @model_validator(mode="before")
    @classmethod
    def _of_preset(cls, tree: Any) -> Any:
        if not isinstance(tree, Mapping) or "preset" not in tree:
            return tree
        if (preset := tree["preset"]) not in PRESETS:
            raise ValueError(f"preset: there are {', '.join(PRESETS)}, not {preset!r}")
        return {**{key: value for key, value in tree.items() if key != "preset"}, **PRESETS[preset]}

    @model_validator(mode="after")
    def _hash_is_one(self) -> "GateConfig":
        if self.vgg_weights.startswith(BY_HASH) and not _HASH.fullmatch(self.vgg_weights):
            raise ValueError(f"vgg_weights: {BY_HASH} takes the first 16 or more digits that 'dsmip features' printed")
        return self

    @model_validator(mode="after")
    def _fusion_is_of_frozen_experts(self) -> "GateConfig":
        needed = {"choice": "mention", "training": "mixture", "units": "frozen", "final_activation": "none"}
        wrong = [f"{key}: {value}" for key, value in needed.items() if getattr(self, key) != value]
        if self.calibration == "scale":
            wrong.append("calibration: fitted (or none)")
        if self.fuses and wrong:
            raise ValueError(
                f"inputs: {self.inputs}, scoring: {self.scoring}, calibration: {self.calibration} take experts as "
                f"distributions over the knowledge base, which needs {', '.join(wrong)}; preset: confidence has all"
            )
        return self

    @model_validator(mode="after")
    def _form_fits_the_choice(self) -> "GateConfig":
        if self.training == "mixture" and self.choice == "pair":
            raise ValueError(
                "training: mixture needs choice: mention (experts are mixed as distributions over entities)"
            )
        if self.mlp == "shared" and self.choice == "mention":
            raise ValueError("mlp: shared needs choice: pair (where every mention chooses, entities have none)")
        return self


def image_network(config: GateConfig, backbone: BackboneConfig) -> NetworkChoice:
    """What the gate looks at images with."""
    if find_network(config.picture).of_backbone:
        return NetworkChoice(config.picture, backbone.pretrained, backbone.architecture)
    return NetworkChoice(config.picture, None if config.vgg_weights == RANDOM else config.vgg_weights)


def check_weights_named(config: GateConfig) -> None:
    """Checks that the weights of the gate's own image network are there, where they are named by a file.

    Published weights and those that are named by hash are looked for when features are made or found.

    Raises:
        UserError: There is no such file.
    """
    network, weights = find_network(config.picture), config.vgg_weights
    if network.of_backbone or weights in (RANDOM, *network.published) or weights.startswith(BY_HASH):
        return
    if not Path(weights).is_file():
        raise UserError(
            f"{network.title} weights {weights} do not exist (system.gate.vgg_weights); name a file of them, "
            "or set system.gate.picture to clip"
        )


def stored_images(
    config: GateConfig,
    backbone: BackboneConfig,
    dataset: Dataset,
    dtype: DTypeName,
    pixels: PixelForm | None = None,
) -> ImageFeatures | None:
    """The gate's image features where they lie beside the shards, the same that it would compute; else None.

    Weights are loaded only to compare them, and only when there is something to compare with.

    Args:
        pixels: How pictures become squares; None: as the backbone's weights expect it.

    Raises:
        UserError: Weights cannot be loaded, or the features are damaged.
    """
    network = resolve_architecture(backbone.architecture)
    found = list(find_features(dataset, config.picture, network.image_size, pixels or network.pixels, dtype))
    if not found:
        return None
    is_wanted = _same_weights(config, backbone)
    return next((features for features in found if is_wanted(features.manifest.origin.weights)), None)


def _same_weights(config: GateConfig, backbone: BackboneConfig) -> Callable[[Weights], bool]:
    choice, network = image_network(config, backbone), find_network(config.picture)
    if choice.weights in network.published:
        return lambda weights: weights.name == choice.weights_name
    if not network.of_backbone and config.vgg_weights.startswith(BY_HASH):
        return lambda weights: weights.sha256.startswith(config.vgg_weights.removeprefix(BY_HASH))
    sha256 = network_hash(choice.build().identity())
    return lambda weights: weights.sha256 == sha256


def _text_vectors(config: GateConfig, backbone: Backbone, batch: ItemBatch) -> Tensor:
    """float [N, `GateConfig.text_width`]."""
    if config.text == "tower":
        return backbone.encode_text(batch.token_ids, batch.token_mask).pooled
    return backbone.token_embedding_mean(batch.token_ids, batch.token_mask)


def _text_settings(config: GateConfig) -> Mapping[str, Tensor]:
    """Beside tensors in the key of features; none for what earlier caches hold."""
    return {"text_of_tower": torch.tensor(1.0)} if config.text == "tower" else {}


class GateTextEncoder(nn.Module):
    """The gate's input from an item's text alone: column `text` [N, `GateConfig.text_width`]. Frozen."""

    def __init__(self, config: GateConfig, backbone: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = Backbone.build(backbone.architecture, backbone.pretrained)

    def encode_mentions(self, batch: ItemBatch) -> Table:
        return self._encode(batch)

    def encode_entities(self, batch: ItemBatch) -> Table:
        return self._encode(batch)

    def encoder_state(self) -> Mapping[str, Tensor]:
        state = self.state_dict()
        if self.config.text == "tower":
            return {**state, **_text_settings(self.config)}
        return {name: tensor for name, tensor in state.items() if "token_embedding" in name}

    def shared_form(self) -> str:
        return tower_form("gate's texts 1", self)

    def image_token_columns(self) -> Sequence[str]:
        return ()

    @torch.no_grad()
    def _encode(self, batch: ItemBatch) -> Table:
        return Table({"text": _text_vectors(self.config, self.backbone, batch)})


class GateEncoder(nn.Module):
    """The gate's inputs of an item: columns `text` [N, `GateConfig.text_width`] and `picture` [N, d_g]. Frozen."""

    def __init__(self, config: GateConfig, backbone: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = Backbone.build(backbone.architecture, backbone.pretrained)
        kind, choice = find_network(config.picture), image_network(config, backbone)
        # of a backbone: the very one that the texts' embeddings are of
        self._network = ClipImage(self.backbone, backbone.architecture) if kind.of_backbone else choice.build()
        self.add_module(kind.state_name, self._network.module)
        self.requires_grad_(False).eval()

    def encode_mentions(self, batch: ItemBatch) -> Table:
        return self._encode(batch)

    def encode_entities(self, batch: ItemBatch) -> Table:
        return self._encode(batch)

    def encoder_state(self) -> Mapping[str, Tensor]:
        return {**self.state_dict(), **_text_settings(self.config)}

    def shared_form(self) -> str:
        network = self._network.identity()
        described = (network.form, network.mean, network.std, network.side)
        return tower_form(f"gate's texts and image 1 {plain_text(described)}", self)

    def image_token_columns(self) -> Sequence[str]:
        return ()

    @torch.no_grad()
    def _encode(self, batch: ItemBatch) -> Table:
        image = self._network.vectors(batch.images, batch.has_image)
        return Table({"text": _text_vectors(self.config, self.backbone, batch), "picture": image})


class Gate(nn.Module):
    """Logits of B experts per pair, from two MLPs of the same form, or one for both sides."""

    def __init__(self, config: GateConfig, text_width: int, image_width: int, num_experts: int) -> None:
        super().__init__()
        self.config = config
        self.mention_mlp = _mlp(text_width + image_width, config)
        self.mention_logits = nn.Linear(config.width, num_experts)
        if config.choice == "pair":
            if config.mlp == "two":
                self.entity_mlp = _mlp(text_width + image_width, config)
            elif config.inputs == "normalised":  # each side has means of its own
                self.entity_norm = _norm(text_width + image_width)
            self.entity_logits = nn.Linear(config.width, num_experts, bias=False)

    def prepare_mentions(self, features: Table) -> Table:
        """Column `logits` [M, B]: the mentions' half, with the bias."""
        return Table({"logits": self.mention_logits(self.mention_mlp(self._inputs(features)))})

    def prepare_entities(self, features: Table) -> Table:
        """Column `logits` [E, B]: the entities' half; zero columns when the choice is per mention."""
        inputs = self._inputs(features)
        if self.config.choice == "mention":
            return Table({"logits": inputs.new_zeros(len(inputs), self.mention_logits.out_features)})
        return Table({"logits": self.entity_logits(self._of_entities(inputs))})

    def _of_entities(self, inputs: Tensor) -> Tensor:
        """h_e, float [E, width]."""
        if self.config.mlp == "two":
            hidden: Tensor = self.entity_mlp(inputs)
        elif self.config.inputs == "normalised":
            hidden = self.mention_mlp[1:](self.entity_norm(inputs))
        else:
            hidden = self.mention_mlp(inputs)
        return hidden

    def log_pi(self, mentions: Table, entities: Table) -> Tensor:
        """Log probabilities of the experts [M, E, B] (E is 1 when the choice is per mention), before noise.

        Always float32: a sum of two halves is the same in every tile, so no choice depends on how pairs are scored.
        """
        logits_MEB = mentions.dense("logits").float()[:, None, :]
        if self.config.choice == "pair":
            logits_MEB = logits_MEB + entities.dense("logits").float()[None, :, :]
        if self.config.final_activation == "relu":
            logits_MEB = torch.relu(logits_MEB)
        return torch.log_softmax(logits_MEB, dim=-1)

    @staticmethod
    def _inputs(features: Table) -> Tensor:
        return torch.cat([features.dense("text").float(), features.dense("picture").float()], dim=-1)


def _mlp(input_width: int, config: GateConfig) -> nn.Sequential:
    def block(width: int) -> list[nn.Module]:
        return [nn.Linear(width, config.width), nn.LeakyReLU(), nn.Dropout(config.dropout)]

    normalise = [_norm(input_width)] if config.inputs == "normalised" else []
    return nn.Sequential(*normalise, *block(input_width), *block(config.width))


def _norm(width: int) -> nn.Module:
    # plain means over all batches (momentum None): decaying ones start at variance 1, a thousand times the inputs'
    return nn.BatchNorm1d(width, eps=_SMALLEST_VARIANCE, momentum=None, affine=False)
