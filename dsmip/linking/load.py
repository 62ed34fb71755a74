"""Opening of a linker from what a training has left."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

import torch

from dsmip.data.dataset import Dataset
from dsmip.encoders.base import FeatureEncoder
from dsmip.encoders.feature_keys import fingerprint
from dsmip.errors import UserError
from dsmip.evaluation.index_builder import OpenedModel, built_index, plan_index
from dsmip.evaluation.stored.calibration import stored_calibration
from dsmip.linking.bundle import BUNDLE, Example, read_manifest
from dsmip.linking.found_bundles import find_bundle
from dsmip.linking.growing.entities import BundleEntities
from dsmip.linking.growing.preparation import ItemEncoder
from dsmip.linking.knowledge_base import KnowledgeBase
from dsmip.linking.linker import LinkedModel, Linker, Origin
from dsmip.linking.opened_bundle import BundleSource, second_stage_of
from dsmip.linking.search import ExactSearch
from dsmip.progress import Progress, no_progress
from dsmip.rank_options import RankOptions
from dsmip.runs.run import Run
from dsmip.storage.locations import Location, local_path
from dsmip.storage.run_storage import STAMP, RunStorage

_NUM_EXAMPLES = 4


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


def examples_of(location: Location, options: LoadOptions = LoadOptions()) -> tuple[Example, ...]:
    """Some mentions to try a linker with: test mentions of a run's data, or those that a bundle has.

    Raises:
        UserError: No run, data or bundle there.
    """
    if (bundle := find_bundle(location)) is not None:
        return read_manifest(bundle.folder)[0].examples
    return examples_of_data(Run.open(location, options.data).dataset)


def examples_of_data(dataset: Dataset) -> tuple[Example, ...]:
    """Its first test mentions."""
    return tuple(
        Example(word=each.word, sentence=each.sentence) for each in islice(dataset.mentions("test"), _NUM_EXAMPLES)
    )


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
        location: A folder, or its URI in an object store; of a bundle also hf-hub:owner/name.
        device: Where mentions are encoded and scored.
        options: Which model of a run, and where its data is.
        progress: Of the index, while it is built.
        notice: Takes a line about features that are read beside the shards.

    Raises:
        UserError: No run, model or data there, a model that cannot be indexed, or a damaged bundle.
    """
    if (bundle := find_bundle(location)) is not None:
        return _of_bundle(BundleSource(bundle, str(location), device, options.rank), options)
    folder = None if isinstance(location, RunStorage) else local_path(location)
    if folder is not None and not (folder / STAMP).is_file():
        raise UserError(f"{location}: neither a run nor a bundle (no {STAMP}, no {BUNDLE})")
    opened = OpenedModel(Run.open(location, options.data), options.model)
    run, model = opened.run, opened.model
    plan = plan_index(opened, notice=notice)
    index = built_index(opened, plan, device, progress)
    calibration = stored_calibration(run, model.name)
    if calibration is not None and calibration.index != plan.name:
        calibration = None  # of other weights or entities
    second_stage = second_stage_of(run, model, device)
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
    origin = Origin(lambda: load_linker(location, device, options), _no_bundle(location))
    return Linker(linked, KnowledgeBase.of_dataset(run.dataset), search, second_stage, calibration, origin)


def load_entities(location: Location, device: torch.device) -> BundleEntities:
    """The entities of a bundle, to be changed; its model is opened where it is needed.

    Args:
        location: The folder of a bundle.
        device: Where entities are encoded.

    Raises:
        UserError: There is none, or one that is not to be changed.
    """
    bundle = find_bundle(location)
    if bundle is None:
        raise UserError(_no_bundle(location))
    found = BundleSource(bundle, str(location), device).entities()
    if isinstance(found, str):
        raise UserError(found)
    return found


def _no_bundle(location: Location) -> str:
    return (
        f"{location} is no bundle, and only a bundle's entities can be changed; "
        f"export the run first (dsmip export {location} OUT)"
    )


def _of_bundle(source: BundleSource, options: LoadOptions) -> Linker:
    if options.data is not None:
        raise UserError(f"{source.name} is a bundle, which has its entities in it: --data is for runs; leave it out")
    linker = source.linker()
    if options.model not in (None, linker.model.name):
        raise UserError(
            f"{source.name} is a bundle of {linker.model.name}, not of {options.model}; export that from its run"
        )
    return linker


def _mention_encoder(opened: OpenedModel, part: str) -> ItemEncoder:
    """The whole encoder of a part: what lies beside the shards is of their pictures only."""
    features, config = opened.features[part], opened.model.config
    if features.beside is None:
        return ItemEncoder(features.encoder, features.collator)
    encoder: FeatureEncoder = features.home.load_encoder(part, config)
    return ItemEncoder(encoder, features.home.collator(part))
