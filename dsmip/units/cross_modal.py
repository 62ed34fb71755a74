"""The unit of cross-modal pairs: texts of one side against pictures of the other, both in the towers' shared space.

Ours, for the first limitation that DSMIP's paper names: one expert reads the same modality of both sides. Pooled text
and picture are compared as they are, and tokens with tokens by the text unit's attention: for each place of the entity,
what it finds among the mention's. N items, M mentions, E entities, z width of the shared space, d unit width.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from dsmip.data.collate import Modality
from dsmip.data.table import Ragged, Table
from dsmip.encoders.base import FeatureSizes, Side
from dsmip.units.text_unit import TextUnit

_UNIT = "cross_modal"


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
    """Scores pairs from one modality of mentions and the other one of entities.

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
        inputs = self.mention_norm(*float_inputs(features, self.mentions))
        return self.unit.prepare_mentions(*inputs).prefixed(_UNIT)

    def prepare_entities(self, features: Table) -> Table:
        """Columns of `TextUnit.prepare_entities` below the unit's name."""
        inputs = self.entity_norm(*float_inputs(features, self.entities))
        return self.unit.prepare_entities(*inputs).prefixed(_UNIT)

    def score(self, mentions: Table, entities: Table, wanted_ME: Tensor | None = None) -> dict[str, Tensor]:
        """The unit's scores [M, E], by its name.

        Entities that are known to be equal (all without a picture) are scored once: they tie to the last bit.

        Args:
            wanted_ME: bool; scores of other pairs may lack the token-level half.
        """
        once, index_E = entities.under(_UNIT).distinct()
        own = mentions.under(_UNIT)
        if index_E is None:
            return {_UNIT: self.unit.score(own, once, wanted_ME)}
        wanted_MU = None
        if wanted_ME is not None:
            counts_MU = wanted_ME.new_zeros(len(wanted_ME), len(once), dtype=torch.int32)
            wanted_MU = counts_MU.index_add(1, index_E, wanted_ME.int()) > 0
        return {_UNIT: self.unit.score(own, once, wanted_MU)[:, index_E]}

    def image_columns(self, prepared: Table) -> list[str]:
        """All columns of prepared entities whose picture is read; none of those whose text is."""
        return list(prepared.columns) if self.entities == "image" else []

    def global_vectors(self, prepared: Table, side: Side) -> Tensor:
        """The text unit's: the pooled half, without that of tokens."""
        return self.unit.global_vectors(prepared.under(_UNIT), side)


def float_inputs(features: Table, modality: Modality) -> tuple[Tensor, Ragged]:
    """Pooled and token features as float32 (the cache may hold float16)."""
    tokens = features.ragged(f"{modality}_tokens")
    values = Ragged(tokens.values.float(), tokens.starts, tokens.lengths)
    return features.dense(f"{modality}_global").float(), values
