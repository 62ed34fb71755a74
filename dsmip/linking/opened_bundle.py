"""Opening of linkers from a bundle, whose entities may change while its model stays."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dsmip.calibration.calibration import read_calibration
from dsmip.distillation.vectors import DistilledVectors, Projection
from dsmip.errors import UserError
from dsmip.evaluation.candidates import GlobalVectors
from dsmip.linking.bundle import (
    CALIBRATION,
    CANDIDATES,
    INDEX,
    BundledParts,
    BundleFile,
    BundleManifest,
    bundled_config,
    check_files,
    check_no_others,
    read_manifest,
)
from dsmip.linking.found_bundles import FoundBundle
from dsmip.linking.growing.entities import BundleEntities
from dsmip.linking.growing.preparation import EntityPreparer, ItemEncoder
from dsmip.linking.growing.segments import read_entities, read_index
from dsmip.linking.linker import LinkedModel, Linker, Origin
from dsmip.linking.memory import free_memory
from dsmip.linking.search import ExactSearch, SecondStage
from dsmip.rank_options import RankOptions
from dsmip.runs.loaded_model import CONFIG, LoadedModel, TrainedParts

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _BundledModel:
    """The model of a bundle.

    Attributes:
        files: What it was loaded from.
        distilled: What finds candidates; None: the model's global vectors.
        checked: Files of the bundle whose hashes were looked at.
    """

    model: LoadedModel
    encoders: Mapping[str, ItemEncoder]
    feature_dtype: torch.dtype
    second_stage: SecondStage | None
    files: Mapping[str, BundleFile]
    distilled: DistilledVectors | None
    checked: Mapping[str, BundleFile]


@dataclass(frozen=True)
class BundleSource:
    """A bundle that linkers are opened from.

    Attributes:
        bundle: It.
        name: What messages call it.
        device: Where items are encoded and scored.
        rank: How pairs are scored.
    """

    bundle: FoundBundle
    name: str
    device: torch.device
    rank: RankOptions = RankOptions()

    @property
    def folder(self) -> Path:
        return self.bundle.folder

    def linker(self, before: _BundledModel | None = None) -> Linker:
        """The linker of what the bundle is now.

        Args:
            before: Its model, where it is loaded already; it is loaded again if it has changed.

        Raises:
            UserError: The bundle is damaged, or of another version.
        """
        while True:
            manifest, identity = read_manifest(self.folder)
            try:
                return self._opened(manifest, identity, before)
            except (UserError, OSError):  # of files that a change has made superfluous meanwhile, or of damaged ones
                if read_manifest(self.folder)[1] == identity:
                    raise

    def entities(self) -> BundleEntities | str:
        """Its entities, to be changed; else why they must not be."""
        return self._entities(None)

    def _opened(self, manifest: BundleManifest, identity: str, before: _BundledModel | None) -> Linker:
        if before is None:
            _warn_if_larger(self.name, manifest, free_memory())
        checked = {} if before is None else before.checked
        check_files(self.folder, {name: file for name, file in manifest.files.items() if checked.get(name) != file})
        if before is not None and before.files == manifest.model_files:
            opened = replace(before, checked=manifest.files)
        else:
            opened = self._model(manifest)
        model, segments = opened.model, manifest.all_segments
        linked = LinkedModel(
            model.name,
            self.name,
            opened.encoders,
            opened.feature_dtype,
            model.choices,
            manifest.image_settings,
            identity,
        )
        index = read_index(self.folder, segments, manifest.index_dtype)
        return Linker(
            linked,
            read_entities(self.folder, segments),
            ExactSearch(model.matcher, index, self.device, self.rank, opened.distilled),
            opened.second_stage,
            read_calibration(self.folder / CALIBRATION) if CALIBRATION in manifest.files else None,
            Origin(lambda: self.linker(opened), self._entities(opened)),
        )

    def _model(self, manifest: BundleManifest) -> _BundledModel:
        check_no_others(self.folder, manifest.files)
        listed = frozenset(self.folder / name for name in manifest.files)
        parts = BundledParts(self.folder, bundled_config(self.folder / CONFIG, self.folder), listed)
        model = parts.load_model(manifest.model)
        homes = {part: parts.home(part, model.config) for part in model.feature_parts}
        return _BundledModel(
            model,
            {
                part: ItemEncoder(home.load_encoder(part, model.config), home.collator(part))
                for part, home in homes.items()
            },
            parts.feature_dtype,
            second_stage_of(parts, model, self.device),
            manifest.model_files,
            self._distilled(manifest, model),
            manifest.files,
        )

    def _distilled(self, manifest: BundleManifest, model: LoadedModel) -> DistilledVectors | None:
        if not manifest.has_distilled_vectors:
            return None
        base = GlobalVectors(model.matcher.to(self.device).eval(), self.device)
        return DistilledVectors(Projection.load(self.folder / CANDIDATES), base)

    def _entities(self, opened: _BundledModel | None) -> BundleEntities | str:
        if self.bundle.why_kept is not None:
            return self.bundle.why_kept
        return BundleEntities(self.folder, lambda: self._preparer(opened))

    def _preparer(self, opened: _BundledModel | None) -> EntityPreparer:
        if opened is None:
            manifest, _ = read_manifest(self.folder)
            check_files(self.folder, manifest.model_files)
            opened = self._model(manifest)
        whole_images = opened.second_stage is not None and opened.second_stage.reads_images
        return EntityPreparer(
            opened.model.matcher,
            opened.encoders,
            opened.feature_dtype,
            self.device,
            whole_images,
            opened.files,
            opened.distilled,
        )


def _warn_if_larger(name: str, manifest: BundleManifest, free: int | None) -> None:
    """Logs, which without further ado goes to standard error, that the index has more than the `free` bytes."""
    stored = sum(file.bytes for path, file in manifest.files.items() if f"{INDEX}/" in path)
    if free is None or stored <= free:
        return
    smaller = "" if manifest.index_dtype == "int8" else ", or export it with --index-dtype int8"
    _log.warning(
        f"{name}: its index has {stored / 2**30:.1f} GiB, {free / 2**30:.1f} GiB of memory are free: batches may read "
        f"it from disk again and again, which is slow; take a machine with more{smaller}"
    )


def second_stage_of(parts: TrainedParts, model: LoadedModel, device: torch.device) -> SecondStage | None:
    """The re-ranker of a model, if it has one."""
    if model.reranker is None:
        return None
    reranker = parts.load_reranker(model.reranker).to(device).eval()
    count = parts.system.num_candidates(parts.config.system)
    return SecondStage(reranker, parts.collator(model.reranker), count, device)
