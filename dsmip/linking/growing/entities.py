"""The entities of a bundle as they are changed: new segments of its index, rows that are marked as removed, compaction.

A change writes new files under names that nobody has had, and `bundle.json` last: whoever reads sees the state before
or the state after, and what breaks off leaves the state before. Nothing that is named by `bundle.json` is written to.
Files that it no longer names are deleted when the next change begins; whoever has them open keeps them.
"""

import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dsmip.data.records import Entity
from dsmip.errors import UserError
from dsmip.linking.bundle import (
    BUNDLE,
    ENTITIES,
    INDEX,
    SEGMENTS,
    BundleManifest,
    Segment,
    read_manifest,
    stated_files,
)
from dsmip.linking.growing.preparation import EntityPreparer, WithoutImage
from dsmip.linking.growing.records import EntityReader, GivenEntity, given_entities
from dsmip.linking.growing.segment_files import find_without_image, write_compacted, write_segment
from dsmip.linking.growing.segments import live_rows, read_texts
from dsmip.progress import CountRows, Progress, counting, no_progress
from dsmip.storage.atomic import write_json

LOCK = ".lock"


@dataclass(frozen=True)
class EntitiesChange:
    """What has been done to a bundle.

    Attributes:
        added, removed: How many entities; one that is updated counts as both.
        entities: How many there are now.
        segments: In how many segments of the index.
        dead: Rows in these that are entities no more.
    """

    added: int
    removed: int
    entities: int
    segments: int
    dead: int


class BundleEntities:
    """The entities of a bundle. One process at a time may change them, while others read.

    After any history of changes the knowledge base is the one that is built anew of the entities that were never
    touched, in their order, and then of those that were added or updated, in the order in which that was done.
    The calibration stays as it was fitted.

    Attributes:
        folder: The bundle.
    """

    def __init__(self, folder: Path, preparer: Callable[[], EntityPreparer]) -> None:
        """
        Args:
            folder: The bundle.
            preparer: Opens its model; asked only where entities are encoded.
        """
        self.folder, self._preparer = folder, preparer

    def add(
        self, entities: Iterable[Any], *, images: Path | None = None, progress: Progress = no_progress
    ) -> EntitiesChange:
        """Adds entities behind those that are there.

        Args:
            entities: Records with entity_id, name, attributes (a text, or texts and numbers by key) and images (a path,
                or a list of which the first counts; or a picture as `Linker.link` takes it), `dsmip.Entity`s, an
                Arrow table or a pandas frame of such columns. A generator is read no further than it has to.
            images: The folder that relative paths of pictures start from, and must not leave (default: the present one,
                and any path will do).
            progress: Counts them.

        Raises:
            UserError: An entity is there already or comes twice, cannot be read, or has no name; somebody else changes
                the bundle. Then nothing is changed.
        """
        return self._put(entities, images, progress, replace=False)

    def update(
        self, entities: Iterable[Any], *, images: Path | None = None, progress: Progress = no_progress
    ) -> EntitiesChange:
        """Puts other entities in the place of those with the same ids, as a whole: of the old ones nothing stays.

        They go behind all others, as if they had been removed and added.

        Args:
            entities, images, progress: As for `add`.

        Raises:
            UserError: An entity is not there; else as for `add`. Then nothing is changed.
        """
        return self._put(entities, images, progress, replace=True)

    def remove(self, entities: Iterable[Any]) -> EntitiesChange:
        """Removes entities.

        Args:
            entities: Ids, or records with an entity_id.

        Raises:
            UserError: An entity is not there, or comes twice; none would be left; somebody else changes the bundle.
                Then nothing is changed.
        """
        with self._changing() as manifest:
            known, reader = self._row_by_id(manifest), EntityReader(manifest.image_settings)
            given = _once(given_entities(entities), reader, known, "is not in the knowledge base", there=True)
            rows = [known[entity_id] for entity_id, _ in given]
            if len(rows) == manifest.entities:
                raise UserError(f"{self.folder}: no entity would be left; a knowledge base needs at least one")
            if not rows:
                return _change(manifest, 0, 0)
            return _change(self._commit(manifest, _without(manifest.all_segments, rows)), 0, len(rows))

    def compact(self, progress: Progress = no_progress) -> EntitiesChange:
        """Writes all segments as one, without what was removed. Links stay as they are.

        Args:
            progress: Counts the entities.

        Raises:
            UserError: Somebody else changes the bundle.
        """
        with self._changing() as manifest:
            if len(manifest.all_segments) == 1 and not manifest.all_segments[0].removed:
                return _change(manifest, 0, 0)
            count = counting(progress, "entities written", manifest.entities)
            folder, name = self._new_segment()
            write_compacted(self.folder, manifest.all_segments, folder, count)
            segment = Segment(folder=name, entities=manifest.entities)
            return _change(self._commit(manifest, [segment], name), 0, 0)

    def _put(
        self, entities: Iterable[Any], images: Path | None, progress: Progress, *, replace: bool
    ) -> EntitiesChange:
        remedy = "is not in the knowledge base: 'add' adds it" if replace else "is there already: 'update' replaces it"
        with self._changing() as manifest:
            known, reader = self._row_by_id(manifest), EntityReader(manifest.image_settings, images)
            replaced, total = list[int](), 0
            if not isinstance(entities, Iterator):  # what can be read twice is checked before anything is encoded
                total = sum(1 for _ in _once(given_entities(entities), reader, known, remedy, there=replace))

            def read() -> Iterator[Entity]:
                for entity_id, each in _once(given_entities(entities), reader, known, remedy, there=replace):
                    if replace:
                        replaced.append(known[entity_id])
                    yield reader.read(each)

            count = counting(progress, "entities encoded", total)
            folder, name = self._new_segment()
            num_entities = self._write(manifest, folder, read(), count)
            if not num_entities:
                shutil.rmtree(folder)
                return _change(manifest, 0, 0)
            new = Segment(folder=name, entities=num_entities)
            segments = [*_without(manifest.all_segments, replaced), new]
            return _change(self._commit(manifest, segments, name), num_entities, len(replaced))

    def _write(self, manifest: BundleManifest, folder: Path, entities: Iterator[Entity], count: CountRows) -> int:
        preparer = self._preparer()
        if preparer.files != manifest.model_files:
            raise UserError(f"{self.folder}: its model is another one by now; open the bundle again")
        without_image = WithoutImage(lambda: find_without_image(self.folder, manifest.all_segments))
        return write_segment(folder, entities, preparer, manifest.index_dtype, without_image, count)

    def _new_segment(self) -> tuple[Path, str]:
        """A folder that nothing names yet, and its name in the bundle."""
        name = f"{SEGMENTS}/{uuid.uuid4().hex[:12]}"
        return self.folder / name, name

    def _row_by_id(self, manifest: BundleManifest) -> Mapping[str, int]:
        segments = manifest.all_segments
        columns = (read_texts(self.folder, segment, ["entity_id"]).column("entity_id") for segment in segments)
        return {id_: row for row, id_ in enumerate(id_ for column in columns for id_ in column.to_pylist())}

    @contextmanager
    def _changing(self) -> Iterator[BundleManifest]:
        """The manifest that nobody else changes meanwhile; what is left of changes that broke off is deleted."""
        with _locked(self.folder):
            manifest = self._cleaned()
            try:
                yield manifest
            except BaseException:
                self._cleaned()
                raise

    def _cleaned(self) -> BundleManifest:
        """The manifest; files of segments that it does not name are deleted."""
        manifest, _ = read_manifest(self.folder)
        named = {segment.folder for segment in manifest.all_segments}
        for folder in self.folder.glob(f"{SEGMENTS}/*"):
            if f"{SEGMENTS}/{folder.name}" not in named:
                shutil.rmtree(folder)
        if "" not in named:
            shutil.rmtree(self.folder / INDEX, ignore_errors=True)
            (self.folder / ENTITIES).unlink(missing_ok=True)
        for left in self.folder.glob(f".{BUNDLE}.*.tmp"):
            left.unlink(missing_ok=True)
        return manifest

    def _commit(self, manifest: BundleManifest, segments: Sequence[Segment], new: str | None = None) -> BundleManifest:
        """Writes the manifest with other segments, of which `new` has just been written."""
        named = {segment.folder for segment in segments}
        gone = [segment for segment in manifest.all_segments if segment.folder not in named]
        files = {name: file for name, file in manifest.files.items() if not any(each.has(name) for each in gone)}
        if new is not None:
            files |= {f"{new}/{name}": file for name, file in stated_files(self.folder / new).items()}
        changed = BundleManifest(
            **{
                **manifest.model_dump(),
                "entities": sum(len(live_rows(segment)) for segment in segments),
                "segments": tuple(segment.model_dump() for segment in segments),
                "files": files,
            }
        )
        write_json(self.folder / BUNDLE, changed.model_dump(mode="json"))
        return changed


def _once(
    given: Iterable[GivenEntity], reader: EntityReader, known: Mapping[str, int], otherwise: str, *, there: bool
) -> Iterator[tuple[str, GivenEntity]]:
    """Records with their ids.

    Raises:
        UserError: One has no id, comes twice, or is known although it should not be `there` (or the other way round).
    """
    seen: dict[str, str] = {}
    for each in given:
        entity_id = reader.id_of(each)
        if entity_id in seen:
            raise UserError(f"{each.where}: {entity_id}: comes twice (first: {seen[entity_id]})")
        if (entity_id in known) != there:
            raise UserError(f"{each.where}: {entity_id}: {otherwise}")
        seen[entity_id] = each.where
        yield entity_id, each


def _without(segments: Sequence[Segment], rows: Sequence[int]) -> list[Segment]:
    """Segments of which rows of the knowledge base are removed; those that have none left are left out."""
    kept, start, all_rows = list[Segment](), 0, np.array(sorted(rows), dtype=np.int64)
    for segment in segments:
        live = live_rows(segment)
        own = all_rows[(all_rows >= start) & (all_rows < start + len(live))] - start
        start += len(live)
        if len(own) < len(live):
            removed = np.union1d(np.array(segment.removed, dtype=np.int64), live[own])
            kept.append(Segment(folder=segment.folder, entities=segment.entities, removed=tuple(removed.tolist())))
    return kept


def _change(manifest: BundleManifest, added: int, removed: int) -> EntitiesChange:
    segments = manifest.all_segments
    dead = sum(len(segment.removed) for segment in segments)
    return EntitiesChange(added, removed, manifest.entities, len(segments), dead)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Nobody else changes the bundle meanwhile; the lock goes with the process.

    Raises:
        UserError: Somebody does.
    """
    import fcntl  # not on every system that reads bundles

    with (folder / LOCK).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: somebody else is changing its entities; try again when that is done") from None
        except OSError as error:
            raise UserError(f"{folder}: cannot be locked ({error.strerror}); change it on another disk") from None
        yield
