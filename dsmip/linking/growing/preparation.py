"""Preparation of entities that come to an index later, with the numbers that it would have had of them anyway."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from dsmip.data.collate import Collator
from dsmip.data.records import Entity
from dsmip.data.table import Table, concatenate
from dsmip.distillation.vectors import DistilledVectors
from dsmip.encoders.base import FeatureEncoder
from dsmip.encoders.feature_cache import chunked, encode_entities, whole_features
from dsmip.evaluation.preparation import prepare_in_tiles, sharing_image
from dsmip.linking.bundle import BundleFile, IndexDtype
from dsmip.linking.growing.index_storage import restored, stored_as
from dsmip.units.matcher import Matcher

_TILE = 512  # entities whose features are held at a time
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class ItemEncoder:
    """What makes a part's features.

    Attributes:
        encoder: The part's, or a gate's.
        collator: In the form that it reads.
    """

    encoder: FeatureEncoder
    collator: Collator


@dataclass(frozen=True)
class EntityPreparer:
    """A bundle's model, as far as it prepares entities.

    Attributes:
        matcher: Of prepared items.
        encoders: By part.
        feature_dtype: In which features are kept when the model is evaluated.
        device: Where entities are encoded and prepared.
        whole_images: Pictures are kept whole, for a re-ranker that looks at them.
        files: What it was loaded from: entities of another model's index are not to be mixed with its own.
        distilled: What makes their vectors for candidates, which an index then holds; None: it holds none.
    """

    matcher: Matcher
    encoders: Mapping[str, ItemEncoder]
    feature_dtype: torch.dtype
    device: torch.device
    whole_images: bool
    files: Mapping[str, BundleFile]
    distilled: DistilledVectors | None = None

    def prepared(self, entities: Sequence[Entity], dtype: IndexDtype, without_image: "WithoutImage") -> Table:
        """Prepared entities, on the CPU.

        Args:
            entities: Some of them.
            dtype: In which the index is stored.
            without_image: What those without a picture share.
        """
        return concatenate([self._tile(tile, dtype, without_image) for tile in chunked(entities, _TILE)])

    def _tile(self, entities: Sequence[Entity], dtype: IndexDtype, without_image: "WithoutImage") -> Table:
        lacking_E = torch.tensor([not each.images for each in entities])

        def alone(row: int) -> Table:
            return restored(without_image.shared(lambda: stored_as(self._computed([entities[row]]), dtype)))

        prepared = sharing_image(self.matcher, self._computed(entities), range(len(entities)), lacking_E, alone)
        return stored_as(prepared if self.distilled is None else self.distilled.with_vectors(prepared), dtype)

    @torch.no_grad()
    def _computed(self, entities: Sequence[Entity]) -> Table:
        matcher, tables = self.matcher.to(self.device), {}
        for part, each in self.encoders.items():
            encoder = each.encoder.to(self.device)
            tables[part] = encode_entities(entities, encoder, each.collator, self.device, self.feature_dtype)
        features = whole_features(tables, list(tables)) if len(tables) > 1 else next(iter(tables.values()))
        return prepare_in_tiles(matcher, features, "entities", self.device).to(_CPU)


class WithoutImage:
    """A prepared entity without a picture: all others share its numbers of that to the last bit, so that they tie.

    Args:
        stored: Finds one in the index.
    """

    def __init__(self, stored: Callable[[], Table | None]) -> None:
        self._stored = stored
        self._table: Table | None = None

    def shared(self, compute: Callable[[], Table]) -> Table:
        """The stored one; where there is none, the one that is computed first."""
        if self._table is None:
            self._table = self._stored()
        if self._table is None:
            self._table = compute()
        return self._table
