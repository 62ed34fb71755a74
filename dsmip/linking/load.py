"""Opening of a linker from what a training has left."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from dsmip.calibration.calibration import read_calibration
from dsmip.encoders.base import FeatureEncoder
from dsmip.encoders.feature_cache import fingerprint
from dsmip.errors import UserError
from dsmip.evaluation.index_builder import OpenedModel, built_index, plan_index
from dsmip.evaluation.report import stored_calibration
from dsmip.linking.bundle import (
    BUNDLE,
    CALIBRATION,
    INDEX,
    BundledParts,
    bundled_config,
    bundled_entities,
    bundled_index,
    is_bundle,
    open_bundle,
)
from dsmip.linking.hub import HUB, bundle_of_hub
from dsmip.linking.knowledge_base import KnowledgeBase
from dsmip.linking.linker import LinkedModel, Linker, MentionEncoder
from dsmip.linking.search import ExactSearch, SecondStage
from dsmip.progress import Progress, no_progress
from dsmip.rank_options import RankOptions
from dsmip.runs.loaded_model import CONFIG, LoadedModel, TrainedParts
from dsmip.runs.run import Run
from dsmip.storage.atomic import sha256_file
from dsmip.storage.locations import Location, local_path
from dsmip.storage.run_storage import STAMP, RunStorage


@dataclass(frozen=True)
class LoadOptions:
    """How a linker is opened.

    Attributes:
        model: A finished part, or the system's name for the whole (None: the whole, if there is one).
        data: Where a run's data lies, if it has moved.
        rank: How pairs are scored; no score depends on it.
    """

    model: str | None = None
    data: Location | None = None
    rank: RankOptions = RankOptions()


def load_linker(
    location: Location,
    device: torch.device,
    options: LoadOptions = LoadOptions(),
    *,
    progress: Progress = no_progress,
    notice: Callable[[str], None] = lambda line: None,
) -> Linker:
    """The linker of a run or a bundle. A run's index is the one of `dsmip evaluate`, and is built where it is missing.

    Args:
        location: A folder; of a run also its URI in an object store, of a bundle also hf-hub:owner/name.
        device: Where mentions are encoded and scored.
        options: Which model of a run, and where its data is.
        progress: Of the index, while it is built.
        notice: Takes a line about features that are read beside the shards.

    Raises:
        UserError: No run, model or data there, a model that cannot be indexed, or a damaged bundle.
    """
    if isinstance(location, str) and location.startswith(HUB):
        return _of_bundle(bundle_of_hub(location), location, device, options)
    folder = None if isinstance(location, RunStorage) else local_path(location)
    if folder is not None and is_bundle(folder):
        return _of_bundle(folder, str(location), device, options)
    if folder is not None and not (folder / STAMP).is_file():
        raise UserError(f"{location}: neither a run nor a bundle (no {STAMP}, no {BUNDLE})")
    opened = OpenedModel(Run.open(location, options.data), options.model)
    run, model = opened.run, opened.model
    plan = plan_index(opened, notice=notice)
    index = built_index(opened, plan, device, progress)
    calibration = stored_calibration(run, model.name)
    if calibration is not None and calibration.index != plan.name:
        calibration = None  # of other weights or entities
    second_stage = _second_stage(run, model, device)
    about = [plan.name, "" if calibration is None else calibration.model_dump_json()]
    linked = LinkedModel(
        model.name,
        str(run.storage),
        {part: _mention_encoder(opened, part) for part in model.feature_parts},
        run.feature_dtype,
        model.choices,
        run.dataset.manifest.image,
        fingerprint({} if second_stage is None else second_stage.reranker.state_dict(), "\n".join(about)),
    )
    search = ExactSearch(model.matcher, index, device, options.rank)
    return Linker(linked, KnowledgeBase.of_dataset(run.dataset), search, second_stage, calibration)


def _of_bundle(folder: Path, source: str, device: torch.device, options: LoadOptions) -> Linker:
    """The linker of a bundle, called `source` in messages."""
    if options.data is not None:
        raise UserError(f"{source} is a bundle, which has its entities in it: --data is for runs; leave it out")
    manifest = open_bundle(folder)
    if options.model not in (None, manifest.model):
        raise UserError(f"{source} is a bundle of {manifest.model}, not of {options.model}; export that from its run")
    parts = BundledParts(folder, bundled_config(folder / CONFIG, folder))
    model = parts.load_model(manifest.model)
    homes = {part: parts.home(part, model.config) for part in model.feature_parts}
    linked = LinkedModel(
        model.name,
        source,
        {
            part: MentionEncoder(home.load_encoder(part, model.config), home.collator(part))
            for part, home in homes.items()
        },
        parts.feature_dtype,
        model.choices,
        manifest.image_settings,
        sha256_file(folder / BUNDLE),
    )
    index = bundled_index(folder / INDEX)
    path = folder / CALIBRATION
    search = ExactSearch(model.matcher, index, device, options.rank)
    entities = bundled_entities(folder, manifest.entities)
    calibration = read_calibration(path) if path.is_file() else None
    return Linker(linked, entities, search, _second_stage(parts, model, device), calibration)


def _second_stage(parts: TrainedParts, model: LoadedModel, device: torch.device) -> SecondStage | None:
    if model.reranker is None:
        return None
    reranker = parts.load_reranker(model.reranker).to(device).eval()
    count = parts.system.num_candidates(parts.config.system)
    return SecondStage(reranker, parts.collator(model.reranker), count, device)


def _mention_encoder(opened: OpenedModel, part: str) -> MentionEncoder:
    """The whole encoder of a part: what lies beside the shards is of their pictures only."""
    features, config = opened.features[part], opened.model.config
    if features.beside is None:
        return MentionEncoder(features.encoder, features.collator)
    encoder: FeatureEncoder = features.home.load_encoder(part, config)
    return MentionEncoder(encoder, features.home.collator(part))
