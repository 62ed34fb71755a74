"""Matching units with the norms and projections before them (MIMIC, Luo et al. 2023, and what has its form).

MIMIC's and DSMIP's: text alone: U_T; picture alone: U_V; both: U_T, U_V and the cross unit U_C. Names follow the
published state dict. Texts of one side against pictures of the other: the text unit again, over both kinds of tokens.
N items, M mentions, E entities, U of them different, z width of the shared space.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from dsmip.data.collate import Modality
from dsmip.data.table import Ragged, Table
from dsmip.encoders.base import FeatureSizes, Side
from dsmip.units.cross_unit import CrossUnit, FusedUnit
from dsmip.units.text_unit import TextUnit
from dsmip.units.visual_unit import VisualUnit


class TextNorm(nn.Module):
    """One LayerNorm for the pooled text and one for its tokens."""

    def __init__(self, global_width: int, token_width: int) -> None:
        super().__init__()
        self.text_cls_layernorm = nn.LayerNorm(global_width)
        self.text_tokens_layernorm = nn.LayerNorm(token_width)

    def forward(self, global_Nz: Tensor, tokens: Ragged) -> tuple[Tensor, Ragged]:
        """Same shapes and widths as given; padding is not touched."""
        return self.text_cls_layernorm(global_Nz), tokens.map_rows(self.text_tokens_layernorm)


class ImageNorm(nn.Module):
    """Maps pooled picture and picture tokens to the unit width, then one LayerNorm each."""

    def __init__(self, global_width: int, token_width: int, width: int) -> None:
        super().__init__()
        self.image_cls_fc = nn.Linear(global_width, width)
        self.image_tokens_fc = nn.Linear(token_width, width)
        self.image_cls_layernorm = nn.LayerNorm(width)
        self.image_tokens_layernorm = nn.LayerNorm(width)

    def forward(self, global_Nz: Tensor, tokens: Ragged) -> tuple[Tensor, Ragged]:
        """([N, d], ragged rows of d)."""
        global_Nd = self.image_cls_layernorm(self.image_cls_fc(global_Nz))
        return global_Nd, tokens.map_rows(lambda x: self.image_tokens_layernorm(self.image_tokens_fc(x)))


_CROSS_MODAL = "cross_modal"  # the unit's name
MakeUnits = Mapping[str, Callable[[], nn.Module]]
"""How the units named text, image and cross are made; each is a `TextUnit`, a `VisualUnit` or a `FusedUnit`."""


def mimic_units(sizes: FeatureSizes, width: int, *, mask_padding: bool = True) -> MakeUnits:
    """The units of MIMIC and of DSMIP's experts."""
    return {
        "text": partial(TextUnit, sizes.embed_width, sizes.text_width, width, mask_padding=mask_padding),
        "image": partial(VisualUnit, width),
        "cross": partial(CrossUnit, sizes.embed_width, width),
    }


class UnitScorer(nn.Module):
    """Scores pairs from features: text_global, text_tokens, image_global, image_tokens (those of its modalities)."""

    def __init__(
        self,
        modalities: Sequence[Modality],
        sizes: FeatureSizes,
        width: int,
        *,
        mask_padding: bool = True,
        units: MakeUnits | None = None,
    ) -> None:
        """
        Args:
            mask_padding: Of MIMIC's text unit.
            units: Other units than MIMIC's.
        """
        super().__init__()
        made = units or mimic_units(sizes, width, mask_padding=mask_padding)
        self.units = nn.ModuleDict()
        if "text" in modalities:
            self.text_norm = TextNorm(sizes.embed_width, sizes.text_width)
            self.units["text"] = made["text"]()
        if "image" in modalities:
            self.picture_norm = ImageNorm(sizes.embed_width, sizes.vision_width, width)
            self.units["image"] = made["image"]()
        if len(modalities) == 2:
            self.units["cross"] = made["cross"]()

    def prepare_mentions(self, features: Table) -> Table:
        """Everything that the units need of mentions, columns prefixed with the unit's name."""
        return self._prepare(features, "prepare_mentions")

    def prepare_entities(self, features: Table) -> Table:
        """Everything that the units need of entities."""
        return self._prepare(features, "prepare_entities")

    def score(self, mentions: Table, entities: Table, wanted_ME: Tensor | None = None) -> dict[str, Tensor]:
        """Each unit's scores [M, E], by name; a unit with several vectors has one for each, by the vector's name.

        Args:
            wanted_ME: bool; scores of other pairs lack the text units' token-level half.
        """
        scores: dict[str, Tensor] = {}
        for name in self.units:
            unit, sides = self._unit(name), (mentions.under(name), entities.under(name))
            if isinstance(unit, TextUnit):
                scores[name] = unit.score(*sides, wanted_ME)
            elif isinstance(unit, FusedUnit) and len(unit.vectors) > 1:
                scores |= zip(unit.vectors, unit.scores(*sides), strict=True)
            else:
                scores[name] = unit.score(*sides)
        return scores

    @property
    def scores_tokens(self) -> bool:
        """Whether it has the one unit that compares tokens with tokens."""
        return "text" in self.units

    @property
    def num_scores(self) -> int:
        """How many `score` gives."""
        units = map(self._unit, self.units)
        return sum(len(unit.vectors) if isinstance(unit, FusedUnit) else 1 for unit in units)

    def projections(self) -> Sequence[nn.Module]:
        """The maps of pictures to the unit width, which published code has among its encoders."""
        if "image" not in self.units:
            return ()
        return self.picture_norm.image_cls_fc, self.picture_norm.image_tokens_fc

    def image_columns(self, prepared: Table) -> list[str]:
        """Dense columns of prepared items that depend on the picture alone: those of the unit of pictures."""
        columns = prepared.under("image").prefixed("image").columns
        return [name for name, values in columns.items() if not isinstance(values, Ragged)]

    def global_vectors(self, prepared: Table, side: Side) -> Tensor:
        """The units' vectors side by side [N, g]: products are the mean over all scores of what they stand for."""
        blocks = [self._unit(name).global_vectors(prepared.under(name), side) for name in self.units]
        vectors_Ng = torch.cat(blocks, dim=-1)
        return vectors_Ng / self.num_scores if side == "mentions" else vectors_Ng

    def _prepare(self, features: Table, method: str) -> Table:
        inputs: dict[str, Tensor | Ragged] = {}
        if "text" in self.units:
            inputs["text_global"], inputs["text_tokens"] = self.text_norm(*_float_inputs(features, "text"))
        if "image" in self.units:
            inputs["image_global"], inputs["image_tokens"] = self.picture_norm(*_float_inputs(features, "image"))
        prepared = Table({})
        for name in self.units:
            unit = self._unit(name)
            reads = unit.reads if isinstance(unit, FusedUnit) else (f"{name}_global", f"{name}_tokens")
            table: Table = getattr(unit, method)(*(inputs[each] for each in reads))
            prepared = prepared.merged(table.prefixed(name))
        return prepared

    def _unit(self, name: str) -> TextUnit | VisualUnit | FusedUnit:
        unit = self.units[name]
        assert isinstance(unit, TextUnit | VisualUnit | FusedUnit)
        return unit


class SharedSpaceNorm(nn.Module):
    """One LayerNorm for what is pooled and one for tokens; pooled texts and pictures stay in the space they share."""

    def __init__(self, global_width: int, token_width: int) -> None:
        super().__init__()
        self.global_norm = nn.LayerNorm(global_width)
        self.tokens_norm = nn.LayerNorm(token_width)

    def forward(self, global_Nz: Tensor, tokens: Ragged) -> tuple[Tensor, Ragged]:
        """Same shapes and widths as given."""
        return self.global_norm(global_Nz), tokens.map_rows(self.tokens_norm)


class CrossModalScorer(nn.Module):
    """Scores pairs from one modality of mentions and the other one of entities, in the space that both towers share.

    Ours, for the first limitation that DSMIP's paper names: one expert reads the same modality of both sides.

    Reads features <modality>_global and <modality>_tokens. Its score is U_T's (`dsmip.ops.text_unit`), with the
    picture's class and patch tokens in place of one side's text tokens.
    """

    scores_tokens: ClassVar[bool] = True

    def __init__(
        self, mentions: Modality, entities: Modality, sizes: FeatureSizes, width: int, *, mask_padding: bool = True
    ) -> None:
        """
        Args:
            mentions, entities: What is read of them.
            mask_padding: Of the text unit.
        """
        super().__init__()
        self.mentions, self.entities = mentions, entities
        widths = {"text": sizes.text_width, "image": sizes.vision_width}
        self.mention_norm = SharedSpaceNorm(sizes.embed_width, widths[mentions])
        self.entity_norm = SharedSpaceNorm(sizes.embed_width, widths[entities])
        self.unit = TextUnit(
            sizes.embed_width, widths[mentions], width, query_width=widths[entities], mask_padding=mask_padding
        )

    def prepare_mentions(self, features: Table) -> Table:
        """Columns of `TextUnit.prepare_mentions` below the unit's name."""
        inputs = self.mention_norm(*_float_inputs(features, self.mentions))
        return self.unit.prepare_mentions(*inputs).prefixed(_CROSS_MODAL)

    def prepare_entities(self, features: Table) -> Table:
        """Columns of `TextUnit.prepare_entities` below the unit's name."""
        inputs = self.entity_norm(*_float_inputs(features, self.entities))
        return self.unit.prepare_entities(*inputs).prefixed(_CROSS_MODAL)

    def score(self, mentions: Table, entities: Table, wanted_ME: Tensor | None = None) -> dict[str, Tensor]:
        """The unit's scores [M, E], by its name.

        Entities that are known to be equal (all without a picture) are scored once: they tie to the last bit.

        Args:
            wanted_ME: bool; scores of other pairs may lack the token-level half.
        """
        once, index_E = entities.under(_CROSS_MODAL).distinct()
        own = mentions.under(_CROSS_MODAL)
        if index_E is None:
            return {_CROSS_MODAL: self.unit.score(own, once, wanted_ME)}
        wanted_MU = None
        if wanted_ME is not None:
            counts_MU = wanted_ME.new_zeros(len(wanted_ME), len(once), dtype=torch.int32)
            wanted_MU = counts_MU.index_add(1, index_E, wanted_ME.int()) > 0
        return {_CROSS_MODAL: self.unit.score(own, once, wanted_MU)[:, index_E]}

    def image_columns(self, prepared: Table) -> list[str]:
        """All columns of prepared entities whose picture is read; none of those whose text is."""
        return list(prepared.columns) if self.entities == "image" else []

    def global_vectors(self, prepared: Table, side: Side) -> Tensor:
        """The text unit's: the pooled half, without that of tokens."""
        return self.unit.global_vectors(prepared.under(_CROSS_MODAL), side)


def _float_inputs(features: Table, modality: Modality) -> tuple[Tensor, Ragged]:
    """Pooled and token features as float32 (the cache may hold float16)."""
    tokens = features.ragged(f"{modality}_tokens")
    values = Ragged(tokens.values.float(), tokens.starts, tokens.lengths)
    return features.dense(f"{modality}_global").float(), values
