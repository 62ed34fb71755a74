"""The knowledge base of a linker: entities by row or id, with their first pictures."""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from dsmip.data.dataset import Dataset
from dsmip.data.records import Entity
from dsmip.errors import UserError


class KnowledgeBase:
    """Entities in the order of the index. Reading is safe from several threads."""

    def __init__(self, texts: pa.Table, image_of: Callable[[int], bytes | None]) -> None:
        """
        Args:
            texts: columns entity_id, name and attributes, by row.
            image_of: gives the first picture of a row (JPEG bytes), None where it has none.
        """
        self._texts, self._image_of = texts, image_of

    @staticmethod
    def of_dataset(dataset: Dataset) -> "KnowledgeBase":
        """The kb of a prepared data set; pictures are read from its shards when they are asked for."""

        def image_of(row: int) -> bytes | None:
            images = dataset.entity_images(row)
            return images[0] if images else None

        return KnowledgeBase(dataset.entity_texts(), image_of)

    def __len__(self) -> int:
        return len(self._texts)

    def texts(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """entity_id, name and attributes of some rows."""
        taken = self._texts.take(pa.array(rows, pa.int64()))
        return taken.select(["entity_id", "name", "attributes"]).to_pylist()  # type: ignore[no-any-return]

    def entity(self, row: int, *, with_image: bool = True) -> Entity:
        """One entity with its first picture.

        Raises:
            IndexError: no such row.
        """
        if not 0 <= row < len(self):
            raise IndexError(f"entity row {row} outside a kb of {len(self)}")
        (text,) = self.texts([row])
        image = self._image_of(row) if with_image else None
        return Entity(row, text["entity_id"], text["name"], text["attributes"], () if image is None else (image,))

    def image(self, row: int) -> bytes | None:
        """The first picture of a row, JPEG bytes; None where it has none."""
        return self._image_of(row)

    def row_of(self, entity_id: str) -> int:
        """The row of an entity id.

        Raises:
            UserError: there is no such entity.
        """
        row = self.find_id(entity_id)
        if row is None:
            raise UserError(f"no entity {entity_id} in the knowledge base of {len(self)}")
        return row

    def find_id(self, entity_id: str) -> int | None:
        """The row of an entity id; None where there is no such entity."""
        return self._rows.get(entity_id)

    def find(self, query: str, limit: int) -> list[int]:
        """Rows of the first `limit` entities whose name holds the text, in any case; names that begin with it first."""
        names = self._texts.column("name")
        holds = pc.match_substring(names, query, ignore_case=True).to_numpy(zero_copy_only=False).nonzero()[0]
        begins = pc.starts_with(names.take(pa.array(holds)), query, ignore_case=True).to_pylist()
        order = sorted(range(len(holds)), key=lambda each: not begins[each])  # stable: else in the order of the kb
        return [int(holds[each]) for each in order[:limit]]

    @cached_property
    def _rows(self) -> dict[str, int]:
        return {entity_id: row for row, entity_id in enumerate(self._texts.column("entity_id").to_pylist())}
