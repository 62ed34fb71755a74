"""Validation figures of what needs no gate: each expert, and the experts' calibrated mean and product."""

import torch

from dsmip.data.table import Table
from dsmip.evaluation.experts.survey import KeptScores, log_probabilities
from dsmip.evaluation.index import EntityIndex
from dsmip.evaluation.metrics import summarise
from dsmip.evaluation.preparation import prepare_entities
from dsmip.ops.experts.fusion import mixture_scores, product_scores
from dsmip.ops.ranking import Counts, count_against
from dsmip.training.fusion.fit import calibrate, prepared_split
from dsmip.training.validation.validation import SplitFeatures
from dsmip.units.fusion.matcher import FusedMatcher


@torch.no_grad()
def validation_figures(
    fused: FusedMatcher,
    calibration: SplitFeatures,
    validation: SplitFeatures,
    kb: Table,
    device: torch.device,
    kept: KeptScores | None = None,
) -> dict[str, dict[str, float]]:
    """Metrics on validation of each expert and of their calibrated mean and product, in single precision.

    Args:
        fused: Any fusion of the experts; its scales are fitted to `calibration` in place.
        kb: Features `with_has_image`.
        kept: Of the experts and the validation mentions, for other models that fuse them.
    """
    fused.to(device).eval()
    index = EntityIndex([prepare_entities(fused, kb, range(len(kb)), device)])
    calibrate(prepared_split(fused, calibration, index, device), device)
    model = prepared_split(fused, validation, index, device)
    experts = fused.surveyed()
    counts: dict[str, list[Counts]] = {}
    for start, log_p_BME in log_probabilities(model, device, kept):
        gold_M = model.gold_row_M[start : start + log_p_BME.shape[1]].to(device)
        alike_MB = torch.zeros(len(gold_M), len(experts), dtype=torch.float64, device=device)
        totals = dict(zip(experts, log_p_BME, strict=True))
        totals |= {"mean": mixture_scores(log_p_BME, alike_MB), "product": product_scores(log_p_BME, alike_MB)}
        for name, total_ME in totals.items():
            counted = count_against(total_ME, total_ME.gather(1, gold_M[:, None])[:, 0], gold_M)
            counts.setdefault(name, []).append(Counts(*(each.cpu() for each in counted)))
    joined = {name: Counts(*(torch.cat(each) for each in zip(*of, strict=True))) for name, of in counts.items()}
    return {name: summarise(of) for name, of in joined.items()}
