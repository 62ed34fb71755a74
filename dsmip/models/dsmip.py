"""DSMIP (Ma et al., TKDE 2025): three experts and the gate that chooses one of them per pair (eqs. 15-18)."""

from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from dsmip.config import ExperimentConfig, Frozen
from dsmip.data.collate import ItemBatch, ItemFormat
from dsmip.data.dataset import Dataset
from dsmip.data.images import PixelForm
from dsmip.data.table import Table
from dsmip.data.text import Template
from dsmip.encoders.base import FeatureEncoder, Side, StoredFeatures, feature_sizes
from dsmip.encoders.clip import Backbone
from dsmip.encoders.image_networks import find_network
from dsmip.errors import UserError
from dsmip.keys import key_tree, plain_text
from dsmip.models.base import System
from dsmip.ops.gumbel import hard_choice, sample_gumbel
from dsmip.ops.losses import contrastive_loss, contrastive_losses
from dsmip.units.expert import READS, Expert, ExpertConfig, ExpertName
from dsmip.units.fusion.gate import FusionGate
from dsmip.units.fusion.matcher import FusedMatcher, ScoringName
from dsmip.units.gate import Gate, GateConfig, GateEncoder, GateTextEncoder, check_weights_named, stored_images
from dsmip.units.matcher import BatchGold, Matcher, Scores, token_pairs

GATE = "gate"
FUSIONS: Mapping[str, ScoringName] = {"mean": "mixture", "product": "product"}
_SCALE_SPEED = 10.0  # Adam moves a parameter by its learning rate a step, too slow for factors of 3 to 30


class DsmipConfig(Frozen):
    """The `system` section.

    Attributes:
        experts: What stage one trains, by name: the paper's three, and `text_image` and `image_text`, which compare a
            mention's text with an entity's picture and the reverse.
        use: The experts of stage two, two to all of them, in order: ties go to the first.
        width: Of the units.
        mask_padding: Whether the text units pass over padding; the published units do not.
        pixels: How pictures become squares, the gate's too; null: as the backbone's weights expect it.
    """

    added: ClassVar[Mapping[str, Any]] = {"pixels": None}

    experts: dict[ExpertName, ExpertConfig] = {
        "text": ExpertConfig(),
        "visual": ExpertConfig(),
        "multimodal": ExpertConfig(prompt_length=2, prompt_depth=9),
    }
    use: tuple[ExpertName, ...] = ("text", "visual", "multimodal")
    width: int = Field(96, ge=1)
    mask_padding: bool = True
    pixels: PixelForm | None = None
    gate: GateConfig = GateConfig()
    template: Template = Template()

    @model_validator(mode="after")
    def _experts_fit(self) -> "DsmipConfig":
        if len(set(self.use)) != len(self.use) or len(self.use) < 2:
            raise ValueError("use: name two to five different experts")
        if missing := [name for name in self.use if name not in self.experts]:
            raise ValueError(f"use: no expert named {', '.join(missing)} under experts (experts.{missing[0]}: {{}})")
        for name, expert in self.experts.items():
            if name != "multimodal" and (expert.prompt_length or expert.prompt_depth or expert.prompts_in != "both"):
                raise ValueError(
                    f"experts.{name}: only the multimodal expert has prompts; remove prompt_length, prompt_depth and "
                    "prompts_in"
                )
        return self


class DsmipMatcher(Matcher):
    """Scores cached features of all experts: S = sum over experts of z_i S_i with a one-hot z (eq. 18)."""

    def __init__(self, experts: Mapping[str, Expert], gate: Gate) -> None:
        super().__init__()
        self.experts = nn.ModuleDict(experts)
        self.gate = gate
        if gate.config.units == "frozen":
            self.experts.requires_grad_(False)
        elif gate.config.units == "projections_frozen":
            for expert in self._experts().values():
                expert.freeze_projections()
        if gate.config.calibration == "scale":
            self.log_scale_B = nn.Parameter(torch.zeros(len(experts)))

    def encode_mentions(self, batch: ItemBatch) -> Table:
        raise RuntimeError("the gated system scores cached features; encode with its parts")

    def encode_entities(self, batch: ItemBatch) -> Table:
        raise RuntimeError("the gated system scores cached features; encode with its parts")

    def prepare_mentions(self, features: Table) -> Table:
        return self._prepare(features, "prepare_mentions")

    def prepare_entities(self, features: Table) -> Table:
        return self._prepare(features, "prepare_entities")

    def score(self, mentions: Table, entities: Table, *, noise: Tensor | None = None) -> Scores:
        """Scores with the choice of each pair; gradients reach the gate straight through (eqs. 15, 16)."""
        log_pi_MEB = self.gate.log_pi(mentions.under(GATE), entities.under(GATE))
        if not torch.is_grad_enabled():
            return self._chosen_scores(mentions, entities, log_pi_MEB)
        parts = self._expert_scores(mentions, entities)
        scores_MEB = torch.stack(list(parts.values()), dim=-1)
        choice_MEB = hard_choice(log_pi_MEB, noise, self.gate.config.temperature)
        return Scores((choice_MEB * scores_MEB).sum(-1), choice_MEB.argmax(-1).expand(scores_MEB.shape[:2]), parts)

    def part_scores(self, mentions: Table, entities: Table) -> Mapping[str, Tensor]:
        return self._expert_scores(mentions, entities)

    def _chosen_scores(self, mentions: Table, entities: Table, log_pi_MEB: Tensor) -> Scores:
        """Each pair scored by its likeliest expert alone, the first of equals."""
        shape = (len(mentions), len(entities))
        chosen_ME = log_pi_MEB.argmax(dim=-1).expand(shape)
        best_ME2 = log_pi_MEB.topk(2, dim=-1).values
        tied_ME = (best_ME2[..., 0] == best_ME2[..., 1]).expand(shape)
        score = self._mentions_of if self.gate.config.choice == "mention" else self._pairs_of
        wanted = {name: chosen_ME == b for b, name in enumerate(self.experts)}
        parts = self._calibrated({name: score(name, mentions, entities, wanted[name]) for name in wanted})
        texts = [name for name, expert in self._experts().items() if expert.scores_tokens]
        pairs_M2 = token_pairs([wanted[name] for name in texts])
        total_ME = torch.stack(list(parts.values()), dim=-1).gather(-1, chosen_ME[..., None])[..., 0]
        broken_ME = log_pi_MEB.isnan().any(dim=-1).expand(shape)  # argmax would choose all the same
        total_ME = total_ME.masked_fill(broken_ME, torch.nan)
        return Scores(total_ME, chosen_ME, parts, tied_ME, pairs_M2)

    def _mentions_of(self, name: str, mentions: Table, entities: Table, wanted_ME: Tensor) -> Tensor:
        """An expert's scores [M, E] in the rows of mentions that chose it, 0 in the others."""
        row_m = wanted_ME.any(dim=1).nonzero()[:, 0]
        if not len(row_m):
            return torch.zeros_like(wanted_ME, dtype=entities.dense(f"{GATE}.logits").dtype)
        own = mentions.under(name).rows(row_m)
        scores_mE = self._experts()[name].score(own, entities.under(name)).total_ME
        return scores_mE.new_zeros(wanted_ME.shape).index_copy(0, row_m, scores_mE)

    def _pairs_of(self, name: str, mentions: Table, entities: Table, wanted_ME: Tensor) -> Tensor:
        """An expert's scores [M, E] of pairs that chose it, 0 of others; its products that cost little are dense."""
        own = mentions.under(name), entities.under(name)
        scores_ME = self._experts()[name].score(*own, wanted_ME=wanted_ME).total_ME
        return scores_ME.where(wanted_ME, 0.0)

    def image_columns(self, prepared: Table) -> list[str]:
        return [
            f"{name}.{column}"
            for name, expert in self._experts().items()
            for column in expert.image_columns(prepared.under(name))
        ]

    def global_vectors(self, prepared: Table, side: Side) -> Tensor:
        """The experts' vectors side by side [N, g], with their scales.

        Where every mention chooses, only its own expert's block is not zero: products stand for the very score it will
        get. Where every pair chooses, they are the sum over experts, whichever of them the gate will take.
        """
        experts = self._experts().items()
        vectors = [expert.global_vectors(prepared.under(name), side) for name, expert in experts]
        if side == "mentions":
            factors_BM = self._factors(prepared.under(GATE)).T
            vectors = [factor_M[:, None] * own for factor_M, own in zip(factors_BM, vectors, strict=True)]
        return torch.cat(vectors, dim=-1)

    def _factors(self, mentions: Table) -> Tensor:
        """What each mention's experts are multiplied by in `global_vectors` [M, B]; takes the gate's columns."""
        logits_MB = mentions.dense("logits")
        factor_MB = torch.ones_like(logits_MB)
        if self.gate.config.choice == "mention":
            chosen_M = self.gate.log_pi(mentions, Table({}))[:, 0].argmax(dim=-1)
            factor_MB = F.one_hot(chosen_M, logits_MB.shape[1]).to(logits_MB.dtype)
        return factor_MB if self.gate.config.calibration == "none" else factor_MB * self.scale_B()

    def loss(self, mentions: Table, entities: Table, gold: BatchGold) -> Tensor:
        """Eq. 18 with drawn choices, or the likelihood of a mixture."""
        if self.gate.config.training == "mixture":
            return self._mixture_loss(mentions, entities, gold)
        log_pi_shape = (len(mentions), len(entities) if self.gate.config.choice == "pair" else 1, len(self.experts))
        device = gold.column_M.device
        generator = torch.Generator(device).manual_seed(int(torch.randint(2**62, ())))
        noise = sample_gumbel(log_pi_shape, generator, device)
        return contrastive_loss(self.score(mentions, entities, noise=noise).total_ME, gold.column_M, gold.same_ME)

    def scale_B(self) -> Tensor:
        """The learned factor on each expert's scores, float [B]."""
        return (_SCALE_SPEED * self.log_scale_B).exp()

    def _mixture_loss(self, mentions: Table, entities: Table, gold: BatchGold) -> Tensor:
        """-log sum_i pi_i p_i(gold) with p_i an expert's softmax over the batch's entities, summed over mentions."""
        experts = self._expert_scores(mentions, entities)
        log_p_MB = torch.stack([-contrastive_losses(s, gold.column_M, gold.same_ME) for s in experts.values()], dim=-1)
        return -torch.logsumexp(self.gate.log_pi(mentions.under(GATE), entities.under(GATE))[:, 0] + log_p_MB, -1).sum()

    def _expert_scores(self, mentions: Table, entities: Table) -> dict[str, Tensor]:
        return self._calibrated(
            {
                name: expert.score(mentions.under(name), entities.under(name)).total_ME
                for name, expert in self._experts().items()
            }
        )

    def _calibrated(self, scores: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.gate.config.calibration == "none":
            return scores
        return {name: s * scale for (name, s), scale in zip(scores.items(), self.scale_B(), strict=True)}

    def encoder_trains(self) -> bool:
        return False

    def _experts(self) -> dict[str, Expert]:
        return {name: cast(Expert, expert) for name, expert in self.experts.items()}

    def _prepare(self, features: Table, method: str) -> Table:
        prepared: Table = getattr(self.gate, method)(features.under(GATE)).prefixed(GATE)
        for name, expert in self._experts().items():
            prepared = prepared.merged(getattr(expert, method)(features.under(name)).prefixed(name))
        return prepared


class Dsmip(System):
    """How DSMIP is built: a part for each expert, then the gate."""

    name: ClassVar[str] = "dsmip"
    paper: ClassVar[str] = "Ma et al., TKDE 2025"
    published_config: ClassVar[str] = "wikimel"
    config_class: ClassVar[type[Frozen]] = DsmipConfig
    gated: ClassVar[bool] = True
    fusions: ClassVar[tuple[str, ...]] = tuple(FUSIONS)

    @classmethod
    def part_names(cls, section: Any) -> tuple[str, ...]:
        return tuple(section.experts)

    @classmethod
    def feature_parts(cls, section: Any) -> tuple[str, ...]:
        return (*section.use, GATE) if section.gate.sees_items else tuple(section.use)

    @classmethod
    def choices(cls, section: Any) -> tuple[str, ...]:
        return tuple(section.use)

    @classmethod
    def part_key(cls, part: str, config: ExperimentConfig) -> str:
        """Version 1. What is added to an expert or to the templates goes in only where it changes the part."""
        section: DsmipConfig = config.system
        pixels = () if section.pixels is None else (key_tree(section.pixels),)
        if part == GATE:
            text = () if section.gate.text == "embeddings" else (section.gate.text,)
            return plain_text((section.gate.picture, section.gate.vgg_weights, *text, *pixels))
        expert = section.experts[cast(ExpertName, part)]
        of_expert: dict[str, Any] = {
            "tune": expert.tune,
            "prompt_length": expert.prompt_length,
            "prompt_depth": expert.prompt_depth,
        }
        if expert.prompts_in != "both":
            of_expert["prompts_in"] = expert.prompts_in
        texts = {"mention": section.template.mention, "entity": section.template.entity}
        return plain_text((of_expert, section.width, section.mask_padding, texts, *pixels))

    @classmethod
    def item_format(cls, section: Any, part: str) -> ItemFormat:
        if part == GATE:
            return ItemFormat(section.template, pixels=section.pixels)
        reads = READS[part]
        return ItemFormat(
            section.template,
            section.experts[part].num_prompts,
            modalities=reads.mentions,
            pixels=section.pixels,
            entity_modalities=reads.entities if reads.is_cross_modal else None,
        )

    @classmethod
    def check(cls, config: ExperimentConfig, backbone: Backbone) -> None:
        super().check(config, backbone)
        section: DsmipConfig = config.system
        for name, expert in section.experts.items():
            for tower in (backbone.text, backbone.vision)[: 1 if expert.prompts_in == "text" else 2]:
                if expert.num_prompts and (fault := tower.prompt_fault(expert.prompt_depth)):
                    fits = tower is backbone.vision and not backbone.text.prompt_fault(expert.prompt_depth)
                    advice = f"; system.experts.{name}.prompts_in: text puts them into the text tower alone"
                    raise UserError(
                        f"system.experts.{name}.prompt_depth: {fault} of {config.backbone.architecture}"
                        + (advice if fits else "")
                    )
        check_weights_named(section.gate)

    @classmethod
    def build_part(cls, part: str, config: ExperimentConfig, *, with_encoder: bool) -> Expert:
        section: DsmipConfig = config.system
        return Expert.build(
            part,
            section.experts[cast(ExpertName, part)],
            config.backbone,
            section.width,
            mask_padding=section.mask_padding,
            with_encoder=with_encoder,
        )

    @classmethod
    def build_encoder(cls, part: str, config: ExperimentConfig) -> FeatureEncoder:
        if part == GATE:
            return GateEncoder(config.system.gate, config.backbone)
        return cls.build_part(part, config, with_encoder=True)

    @classmethod
    def stored_features(cls, part: str, config: ExperimentConfig, dataset: Dataset) -> StoredFeatures | None:
        if part != GATE:
            return None
        section: DsmipConfig = config.system
        images = stored_images(section.gate, config.backbone, dataset, config.cache_dtype, section.pixels)
        if images is None:
            return None
        text = ItemFormat(section.template, modalities=("text",))
        return StoredFeatures(images.folder, images.file, GateTextEncoder(section.gate, config.backbone), text)

    @classmethod
    def build_whole(cls, config: ExperimentConfig) -> Matcher:
        section, sizes = config.system, feature_sizes(config.backbone.architecture)
        image_width = find_network(section.gate.picture).width(sizes)
        gate: GateConfig = section.gate
        if not gate.fuses:
            paper_gate = Gate(gate, gate.text_width(sizes), image_width, len(section.use))
            return DsmipMatcher(cls._experts(config), paper_gate)
        fusion_gate = FusionGate(
            gate.text_width(sizes) + image_width,
            len(section.use),
            gate.width,
            gate.dropout,
            sees_confidence=gate.sees_confidence,
            sees_items=gate.sees_items,
            normalises=gate.inputs != "raw",
        )
        calibrated = gate.calibration == "fitted"
        return FusedMatcher(cls._experts(config), gate.scoring, fusion_gate, calibrated=calibrated)

    @classmethod
    def build_fusion(cls, name: str, config: ExperimentConfig) -> Matcher:
        return FusedMatcher(cls._experts(config), FUSIONS[name])

    @classmethod
    def _experts(cls, config: ExperimentConfig) -> dict[str, Expert]:
        return {name: cls.build_part(name, config, with_encoder=False) for name in config.system.use}
