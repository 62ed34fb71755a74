"""Stage two of fused experts: a scale per expert, then the gate, from the experts' probabilities over the whole kb.

Experts are frozen, so a mention's survey and the log probabilities that each expert gives to its gold, and for a
product to the gold's rivals, are computed once; an epoch is then of a few numbers per mention. M mentions, E entities,
B experts, K entities with the gold first, F inputs of the gate.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dsmip.config import TrainConfig
from dsmip.data.sampler import draw
from dsmip.data.table import Table
from dsmip.evaluation.experts.survey import (
    KeptScores,
    informed,
    log_probabilities,
    of_expert,
    scored_by_tile,
    survey,
)
from dsmip.evaluation.index import EntityIndex
from dsmip.evaluation.preparation import prepare_entities, prepare_in_tiles
from dsmip.evaluation.ranking import RankedModel, rank_unrefined
from dsmip.ops.experts.fusion import fit_scale, mixture_losses, product_losses, with_rivals
from dsmip.ops.experts.statistics import Survey
from dsmip.rank_options import RankOptions
from dsmip.training.loop import BatchSums, Context, Scale
from dsmip.training.trainer import PartObjective, TrainResult, train
from dsmip.training.validation.validation import SplitFeatures
from dsmip.units.fusion.gate import FusionGate
from dsmip.units.fusion.matcher import FusedMatcher

_RIVALS = 128  # of a gold: what all experts together find likeliest; 512 give the same gate
_FIT_PAIRS = 2**25  # a scale is one number: so many scores tell it well, and are held at a time
LOG_LIKELIHOOD = "log_likelihood"
PRODUCT_LOG_LIKELIHOOD = "product_log_likelihood"  # among the gold and its rivals: not to be compared with the other
FitScores = tuple[KeptScores, KeptScores]  # of the mentions that the gate is fitted to, and of validation


@dataclass(frozen=True)
class _Known:
    """What is known of a split's mentions before the gate is trained.

    Attributes:
        model: Ranks them, once they are informed.
        inputs_MF: The gate's.
        log_p: Log probability that each expert gives to the gold, [M, B]; of a product [M, K, B], to its rivals too.
    """

    model: RankedModel
    survey: Survey
    inputs_MF: Tensor
    log_p: Tensor

    def losses(self, gate: FusionGate, row_m: Tensor) -> Tensor:
        """-log likelihood of some mentions' golds under the fusion that will rank them, float [m]."""
        losses = product_losses if self.log_p.ndim == 3 else mixture_losses
        return losses(gate.logits(self.inputs_MF[row_m]), self.log_p[row_m])


def fit_gate(
    matcher: FusedMatcher,
    training: SplitFeatures,
    validation: SplitFeatures,
    kb: Table,
    config: TrainConfig,
    context: Context,
    *,
    seed: int,
    stop_epoch: int | None = None,
    kept: FitScores | None = None,
) -> TrainResult:
    """Fits the experts' scales, where the matcher is calibrated, and trains the gate on the likelihood of its fusion.

    That of the mixture, or of the product; a gate that chooses learns as if it mixed.

    The best epoch is that of the likeliest validation golds; its weights are ranked with, over the whole kb.

    Args:
        kb: Features `with_has_image`.
        kept: The experts' scores of both splits, for other fits of the same experts, too.

    Raises:
        UserError: The training diverges.
    """
    gate = matcher.gate
    if gate is None:
        raise ValueError("the mean and the product of experts have no gate to fit")
    device = context.device
    matcher.to(device).eval()
    index = EntityIndex([prepare_entities(matcher, kb, range(len(kb)), device)])
    models = [prepared_split(matcher, split, index, device) for split in (training, validation)]
    context.alive()
    kept = kept or (KeptScores(), KeptScores())
    if matcher.calibrated:
        calibrate(models[0], device, kept[0])
    known, judged = (_known(model, gate, device, scores) for model, scores in zip(models, kept, strict=True))
    context.alive()
    gate.fit_normalisation(known.inputs_MF)
    objective = _GateObjective(matcher, gate, known)
    figure = PRODUCT_LOG_LIKELIHOOD if matcher.scoring == "product" else LOG_LIKELIHOOD

    def validate(part: FusedMatcher) -> Mapping[str, float]:
        part.eval()
        with torch.no_grad():
            return {figure: -float(judged.losses(gate, torch.arange(len(judged.log_p))).mean())}

    result = train(
        matcher,
        _Rows(len(known.log_p), config.batch_size, seed),
        config,
        context,
        validate,
        objective=objective,
        seed=seed,
        stop_epoch=stop_epoch,
        best_by=figure,
    )
    ranking = rank_unrefined(
        informed(judged.model, judged.survey, kept[1]), device, after_tile=lambda _: context.alive()
    )
    result.history[result.best_epoch] |= ranking.metrics()
    return result


def calibrate(model: RankedModel, device: torch.device, kept: KeptScores | None = None) -> None:
    """Fits the scale of each of the fused matcher's experts to the model's golds, in place.

    Args:
        kept: Of the model's mentions; used where all of them are looked at.
    """
    matcher, num_mentions = model.matcher, max(_FIT_PAIRS // len(model.index), 1)
    row_M = torch.linspace(0, len(model.mentions) - 1, min(num_mentions, len(model.mentions))).long()
    for b, (name, (expert, _)) in enumerate(matcher.surveyed().items()):
        if len(row_M) < len(model.mentions) or kept is None:
            own = of_expert(model, name, expert)
            tiles = scored_by_tile(replace(own, mentions=own.mentions.take(row_M)), device)
        else:
            tiles = kept.tiles(model, name, device)
        with torch.no_grad():
            scores_ME = torch.cat([scores_ME for _, scores_ME in tiles])
        matcher.get_buffer("scale_B")[b] = fit_scale(scores_ME, model.gold_row_M[row_M].to(scores_ME.device))


def prepared_split(
    matcher: FusedMatcher, split: SplitFeatures, index: EntityIndex, device: torch.device
) -> RankedModel:
    """A split's mentions and the whole kb, ready to be scored on the device."""
    mentions = prepare_in_tiles(matcher, split.mentions, "mentions", device)
    model = RankedModel(matcher, mentions, index, split.gold_row_M, tuple(matcher.surveyed()))
    return model.ready(device, RankOptions(), lambda line: None)


@torch.no_grad()
def _known(model: RankedModel, gate: FusionGate, device: torch.device, kept: KeptScores) -> _Known:
    found = survey(model, device, kept=kept)
    if model.matcher.scoring == "product":
        log_p = _with_rivals(model, device, kept)
    else:
        scores = [
            scale * of_expert(model, name, expert).gold_scores(model.index.under(name), device)
            for name, (expert, scale) in model.matcher.surveyed().items()
        ]
        log_p = torch.stack(scores, dim=1) - found.log_normaliser_MB
    inputs_MF = gate.inputs(model.mentions.under("gate").to(torch.device("cpu")), found)
    return _Known(model, found, inputs_MF.to(device), log_p.float().to(device))


def _with_rivals(model: RankedModel, device: torch.device, kept: KeptScores) -> Tensor:
    """Log probabilities [M, K, B] of the gold and of the entities whose unweighted product is largest."""
    found = []
    for start, log_p_BME in log_probabilities(model, device, kept):
        gold_M = model.gold_row_M[start : start + log_p_BME.shape[1]].to(device)
        found.append(with_rivals(log_p_BME, gold_M, _RIVALS).float())
    return torch.cat(found)


class _GateObjective(PartObjective):
    """The likelihood of the golds under the fusion."""

    def __init__(self, matcher: FusedMatcher, gate: FusionGate, known: _Known) -> None:
        self.module: FusedMatcher = matcher
        self._gate, self._known = gate, known

    def backward(self, batch: Tensor, device: torch.device, scale: Scale) -> BatchSums:
        loss_M = self._known.losses(self._gate, batch)
        scale(loss_M.mean()).backward()
        return BatchSums({"loss": float(loss_M.detach().sum())}, len(batch))


class _Rows:
    """Batches of rows of mentions, every one once in an epoch."""

    hard_row_NK: Tensor | None = None

    def __init__(self, num_mentions: int, batch_size: int, seed: int) -> None:
        self._num_mentions, self._batch_size, self._seed = num_mentions, batch_size, seed

    def num_steps(self) -> int:
        return -(-self._num_mentions // self._batch_size)

    def steps(self, epoch: int, start: int = 0) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(draw(2**63, "order", self._seed, epoch))
        order = torch.randperm(self._num_mentions, generator=generator)
        yield from order.tensor_split(self.num_steps())[start:]
