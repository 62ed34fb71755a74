"""The matching units that an expert owns, with the norms and projections before them (MIMIC, Luo et al. 2023).

Text alone: U_T. Picture alone: U_V. Both: U_T, U_V and the cross unit U_C. Names follow the published state dict.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dsmip.data.collate import Modality
from dsmip.data.table import Ragged, Table
from dsmip.encoders.base import FeatureSizes, Side
from dsmip.units.cross_unit import CrossUnit
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


class UnitScorer(nn.Module):
    """Scores pairs from features: text_global, text_tokens, image_global, image_tokens (those of its modalities)."""

    def __init__(
        self, modalities: Sequence[Modality], sizes: FeatureSizes, width: int, *, mask_padding: bool = True
    ) -> None:
        super().__init__()
        self.units = nn.ModuleDict()
        if "text" in modalities:
            self.text_norm = TextNorm(sizes.embed_width, sizes.text_width)
            self.units["text"] = TextUnit(sizes.embed_width, sizes.text_width, width, mask_padding=mask_padding)
        if "image" in modalities:
            self.picture_norm = ImageNorm(sizes.embed_width, sizes.vision_width, width)
            self.units["image"] = VisualUnit(width)
        if len(modalities) == 2:
            self.units["cross"] = CrossUnit(sizes.embed_width, width)

    def prepare_mentions(self, features: Table) -> Table:
        """Everything that the units need of mentions, columns prefixed with the unit's name."""
        return self._prepare(features, "prepare_mentions")

    def prepare_entities(self, features: Table) -> Table:
        """Everything that the units need of entities."""
        return self._prepare(features, "prepare_entities")

    def score(self, mentions: Table, entities: Table, wanted_ME: Tensor | None = None) -> dict[str, Tensor]:
        """Each unit's scores [M, E], by name; the text unit's lack their token-level half where not wanted (bool)."""
        scores = {}
        for name, unit in self.units.items():
            sides = mentions.under(name), entities.under(name)
            scores[name] = unit.score(*sides, wanted_ME) if isinstance(unit, TextUnit) else _unit(unit).score(*sides)
        return scores

    def image_columns(self, prepared: Table) -> list[str]:
        """Dense columns of prepared items that depend on the picture alone: those of the visual unit."""
        visual = [name for name, unit in self.units.items() if isinstance(unit, VisualUnit)]
        return [
            f"{name}.{column}"
            for name in visual
            for column, values in prepared.under(name).columns.items()
            if not isinstance(values, Ragged)
        ]

    def global_vectors(self, prepared: Table, side: Side) -> Tensor:
        """The units' vectors side by side [N, g]: products are the mean over units of theirs."""
        blocks = [_unit(unit).global_vectors(prepared.under(name), side) for name, unit in self.units.items()]
        vectors_Ng = torch.cat(blocks, dim=-1)
        return vectors_Ng / len(blocks) if side == "mentions" else vectors_Ng

    def _prepare(self, features: Table, method: str) -> Table:
        inputs: dict[str, tuple[Tensor, Ragged]] = {}
        if "text" in self.units:
            inputs["text"] = self.text_norm(*_float_inputs(features, "text"))
        if "image" in self.units:
            inputs["image"] = self.picture_norm(*_float_inputs(features, "image"))
        if "cross" in self.units:
            inputs["cross"] = (inputs["text"][0], inputs["image"][1])
        prepared = Table({})
        for name, unit in self.units.items():
            prepared = prepared.merged(getattr(unit, method)(*inputs[name]).prefixed(name))
        return prepared


def _unit(module: nn.Module) -> TextUnit | VisualUnit | CrossUnit:
    assert isinstance(module, TextUnit | VisualUnit | CrossUnit)
    return module


def _float_inputs(features: Table, modality: Modality) -> tuple[Tensor, Ragged]:
    """Pooled and token features as float32 (the cache may hold float16)."""
    tokens = features.ragged(f"{modality}_tokens")
    values = Ragged(tokens.values.float(), tokens.starts, tokens.lengths)
    return features.dense(f"{modality}_global").float(), values
