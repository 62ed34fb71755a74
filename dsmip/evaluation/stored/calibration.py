"""A model's stored calibration, made where the evaluated split is validation, and the figures that it gives."""

from typing import Any

import torch
from torch import Tensor

from dsmip.calibration.calibration import MIN_MENTIONS, BestScores, Calibration, read_calibration
from dsmip.calibration.figures import confidence_figures
from dsmip.evaluation.index_builder import OpenedEvaluation
from dsmip.evaluation.ranks import Ranking
from dsmip.evaluation.stored.layout import CALIBRATED_ON, CALIBRATION, evaluation_name
from dsmip.runs.run import Run


def stored_calibration(run: Run, model: str) -> Calibration | None:
    """That of a model of a run; None before the model was evaluated on the validation split.

    Raises:
        UserError: Its file is damaged.
    """
    storage = run.storage / evaluation_name(CALIBRATED_ON, model, run.below)
    storage.refresh()
    path = storage.folder / CALIBRATION
    return read_calibration(path) if path.is_file() else None


def best_scores(ranking: Ranking) -> BestScores:
    """What a calibration reads of a ranking."""
    choices = ranking.choices
    return BestScores(ranking.top_score_Mk, torch.zeros_like(ranking.top_row_Mk) if choices is None else choices.top_Mk)


def calibrated(evaluation: OpenedEvaluation, ranking: Ranking, unknown: Ranking | None, index: str) -> dict[str, Any]:
    """Figures of the model's confidences, which are fitted and stored where the split is validation.

    Args:
        evaluation: Of the model, on a split.
        ranking: Of the split's mentions.
        unknown: Of those that have no gold in the kb, where some were kept.
        index: The name of the index that they were ranked with.

    Returns:
        `calibration` of metrics.json; nothing where the model is not calibrated.
    """
    name, is_gold_MK = evaluation.model.name, _is_gold(ranking, evaluation.gold_row_M)
    best, strangers = best_scores(ranking), None if unknown is None else best_scores(unknown)
    storage = evaluation.run.storage / evaluation_name(CALIBRATED_ON, name, evaluation.run.below)
    if evaluation.split == CALIBRATED_ON and len(best) >= MIN_MENTIONS:
        made = Calibration.fit(name, index, evaluation.model.choices, best, is_gold_MK, strangers)
        storage.write_json(CALIBRATION, made.model_dump(mode="json"))
    calibration = stored_calibration(evaluation.run, name)
    if calibration is None or calibration.index != index:
        return {}
    figures = confidence_figures(calibration, best, is_gold_MK, strangers)
    return {"calibration": {**figures, "fitted_on_these": evaluation.split == CALIBRATED_ON}}


def _is_gold(ranking: Ranking, gold_row_M: Tensor) -> Tensor:
    return ranking.top_row_Mk == gold_row_M[:, None]
