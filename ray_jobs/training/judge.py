"""The winner of a sweep against what needs no gate: its experts alone, their calibrated mean and their product."""

import json
from collections.abc import Mapping
from typing import Any

import torch

from dsmip.data.collate import gold_rows
from dsmip.data.manifest import KB
from dsmip.evaluation.experts.survey import KeptScores, surveyed
from dsmip.evaluation.index import EntityIndex
from dsmip.evaluation.preparation import prepare_entities, prepare_in_tiles, with_has_image
from dsmip.evaluation.ranking import RankedModel, rank_unrefined
from dsmip.runs.load_config import read_config
from dsmip.runs.loaded_model import WEIGHTS
from dsmip.runs.run import Run
from dsmip.runs.weights import load_own_weights
from dsmip.training.fusion.figures import validation_figures
from dsmip.training.stages import stage_two_split
from dsmip.training.validation.validation import SplitFeatures
from dsmip.units.fusion.matcher import FusedMatcher
from ray_jobs.cluster.tasks import start_share
from ray_jobs.cluster.workers import worker_device
from ray_jobs.training.trial import PartTables, files_here, load_tables

COLLAPSED = 0.98  # of the validation golds by one expert


def judge(
    root: str, data: str, trial: str, config: str, features: Mapping[str, PartTables], name: str, events: Any
) -> dict[str, Any]:
    """Figures on validation beside a trial's own, for `part.json`.

    `scale`: fitted to the golds `fitted_on`, by expert; `validation`: metrics of each expert, of `mean` and `product`;
    `gold_share`: of the validation golds, by the expert that the gate chose for them.
    """
    step_events = start_share(name, events)
    run, settings, device = Run.open(root, data), read_config(config), worker_device()
    parts = run.system.feature_parts(settings.system)
    paths = {part: files_here(run, settings, part, features[part], device) for part in parts}
    tables = load_tables(json.dumps(paths), parts, str(device), run.dataset.location)
    kb = with_has_image(tables[KB], run.dataset)
    validation = SplitFeatures(tables["validation"], gold_rows(run.dataset, "validation"))
    held_out = run.config.held_out > 0  # else the experts know all training mentions by heart
    fusion = run.build_fusion(run.system.fusions[0], settings)
    assert isinstance(fusion, FusedMatcher)
    calibration = stage_two_split(run, tables["train"]) if held_out else validation
    kept = KeptScores()
    figures = validation_figures(fusion, calibration, validation, kb, device, kept)

    storage = run.storage / trial
    storage.pull(WEIGHTS)
    matcher = run.system.build_whole(settings)
    load_own_weights(matcher, storage.folder / WEIGHTS)
    matcher.to(device)
    mentions = prepare_in_tiles(matcher, validation.mentions, "mentions", device)
    index = EntityIndex([prepare_entities(matcher, kb, range(len(kb)), device)])
    experts = run.system.choices(settings.system)
    model = RankedModel(matcher, mentions, index, validation.gold_row_M, experts)
    choices = rank_unrefined(surveyed(model, device, kept=kept), device).choices
    assert choices is not None
    count_B = torch.bincount(choices.gold_M, minlength=len(experts)).double()
    step_events.step_done(0, 0, 1)
    return {
        "scale": dict(zip(experts, (round(scale, 4) for scale in fusion.scale_B.tolist()), strict=True)),
        "fitted_on": "held-out training golds" if held_out else "validation",
        "validation": figures,
        "gold_share": dict(zip(experts, (count_B / count_B.sum()).tolist(), strict=True)),
    }


def gate_warnings(system: str, best: Mapping[str, float], judged: Mapping[str, Any]) -> list[str]:
    """Why a gate does not earn its place, a line each.

    Args:
        system: Its name.
        best: Its metrics on validation.
        judged: What `judge` returned.
    """
    share, figures = judged["gold_share"], judged["validation"]
    favourite = max(share, key=lambda name: share[name])
    lines = []
    if share[favourite] > COLLAPSED:
        lines.append(
            f"the gate has collapsed: it chooses {favourite} for {share[favourite]:.1%} of the validation golds"
        )
    expert = max(share, key=lambda name: figures[name]["mrr"])
    others = {"its best expert": expert, "its experts' calibrated mean": "mean", "its experts' product": "product"}
    for title, name in others.items():
        if best["mrr"] <= figures[name]["mrr"]:
            lines.append(
                f"{system} is not better than {title} ({name}): validation MRR {best['mrr']:.4f} against "
                f"{figures[name]['mrr']:.4f}"
            )
    return [f"{line}; see docs/paper.md, 'Does the gate earn its place?'" for line in lines]
