"""Opening of a linker from what a training has left."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from dsmip.encoders.base import FeatureEncoder
from dsmip.encoders.feature_cache import fingerprint
from dsmip.errors import UserError
from dsmip.evaluation.index_builder import OpenedModel, built_index, plan_index
from dsmip.evaluation.report import stored_calibration
from dsmip.linking.knowledge_base import KnowledgeBase
from dsmip.linking.linker import LinkedModel, Linker, MentionEncoder
from dsmip.linking.search import ExactSearch, SecondStage
from dsmip.progress import Progress, no_progress
from dsmip.rank_options import RankOptions
from dsmip.runs.run import Run
from dsmip.storage.locations import Location


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
    """The linker of a run: its index is the one that `dsmip evaluate` makes, and is built where it is missing.

    Args:
        location: The run's folder, or its URI in an object store.
        device: Where mentions are encoded and scored.
        options: Which model, and where its data is.
        progress: Of the index, while it is built.
        notice: Takes a line about features that are read beside the shards.

    Raises:
        UserError: No run, model or data there, or a model that cannot be indexed.
    """
    opened = OpenedModel(Run.open(location, options.data), options.model)
    run, model = opened.run, opened.model
    plan = plan_index(opened, notice=notice)
    index = built_index(opened, plan, device, progress)
    encoders = {part: _mention_encoder(opened, part) for part in model.feature_parts}
    second_stage = None
    if model.reranker is not None:
        reranker = run.load_reranker(model.reranker).to(device).eval()
        count = run.system.num_candidates(run.config.system)
        second_stage = SecondStage(reranker, run.collator(model.reranker), count, device)
    calibration = stored_calibration(run, model.name)
    if calibration is not None and calibration.index != plan.name:
        calibration = None  # of other weights or entities
    about = [plan.name, "" if calibration is None else calibration.model_dump_json()]
    weights = {} if second_stage is None else second_stage.reranker.state_dict()
    linked = LinkedModel(
        model.name,
        str(run.storage),
        encoders,
        run.cache.dtype,
        model.choices,
        run.dataset.manifest.image,
        fingerprint(weights, "\n".join(about)),
    )
    search = ExactSearch(model.matcher, index, device, options.rank)
    return Linker(linked, KnowledgeBase.of_dataset(run.dataset), search, second_stage, calibration)


def _mention_encoder(opened: OpenedModel, part: str) -> MentionEncoder:
    """The whole encoder of a part: what lies beside the shards is of their pictures only."""
    features, config = opened.features[part], opened.model.config
    if features.beside is None:
        return MentionEncoder(features.encoder, features.collator)
    encoder: FeatureEncoder = features.home.load_encoder(part, config)
    return MentionEncoder(encoder, features.home.collator(part))


def device_here(name: str | torch.device) -> torch.device:
    """The device of that name.

    Raises:
        UserError: There is no such device on this machine.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device {name} is no device; use cpu, cuda or cuda:<number>") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device {name} is not supported; use cpu, cuda or cuda:<number>")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {name}: this machine has {torch.cuda.device_count()} GPUs")
    return device
