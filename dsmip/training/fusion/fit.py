"""Stage two of fused experts: a scale per expert, then the gate, from the experts' probabilities over the whole kb.

Experts are frozen, so a mention's survey and the log probability that each expert gives to its gold are computed once;
an epoch is then of a few numbers per mention. M mentions, E entities, B experts, F inputs of the gate.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dsmip.config import TrainConfig
from dsmip.data.sampler import draw
from dsmip.data.table import Table
from dsmip.evaluation.experts.survey import informed, of_expert, scored_by_tile, survey
from dsmip.evaluation.index import EntityIndex
from dsmip.evaluation.preparation import prepare_entities, prepare_in_tiles
from dsmip.evaluation.ranking import RankedModel, rank_unrefined
from dsmip.ops.experts.fusion import fit_scale
from dsmip.ops.experts.statistics import Survey
from dsmip.rank_options import RankOptions
from dsmip.training.loop import BatchSums, Context, Scale
from dsmip.training.trainer import PartObjective, TrainResult, train
from dsmip.training.validation.validation import SplitFeatures
from dsmip.units.fusion.gate import FusionGate
from dsmip.units.fusion.matcher import FusedMatcher

_FIT_PAIRS = 2**25  # a scale is one number: so many scores tell it well, and are held at a time
LOG_LIKELIHOOD = "log_likelihood"


@dataclass(frozen=True)
class _Known:
    """What is known of a split's mentions before the gate is trained.

    Attributes:
        model: Ranks them, once they are informed.
        inputs_MF: The gate's.
        log_p_MB: Log probability that each expert gives to the gold.
    """

    model: RankedModel
    survey: Survey
    inputs_MF: Tensor
    log_p_MB: Tensor


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
) -> TrainResult:
    """Fits the experts' scales, where the matcher is calibrated, and trains the gate on the likelihood of the mixture.

    The best epoch is that of the likeliest validation golds; its weights are ranked with, over the whole kb.

    Args:
        kb: Features `with_has_image`.

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
    if matcher.calibrated:
        calibrate(models[0], device)
    known, judged = (_known(model, gate, device) for model in models)
    context.alive()
    gate.fit_normalisation(known.inputs_MF)
    objective = _GateObjective(matcher, gate, known)

    def validate(part: FusedMatcher) -> Mapping[str, float]:
        part.eval()
        with torch.no_grad():
            return {LOG_LIKELIHOOD: -float(_losses(gate, judged.inputs_MF, judged.log_p_MB).mean())}

    result = train(
        matcher,
        _Rows(len(known.log_p_MB), config.batch_size, seed),
        config,
        context,
        validate,
        objective=objective,
        seed=seed,
        stop_epoch=stop_epoch,
        best_by=LOG_LIKELIHOOD,
    )
    ranking = rank_unrefined(informed(judged.model, judged.survey), device, after_tile=lambda _: context.alive())
    result.history[result.best_epoch] |= ranking.metrics()
    return result


def calibrate(model: RankedModel, device: torch.device) -> None:
    """Fits the scale of each of the fused matcher's experts to the model's golds, in place."""
    matcher, num_mentions = model.matcher, max(_FIT_PAIRS // len(model.index), 1)
    row_M = torch.linspace(0, len(model.mentions) - 1, min(num_mentions, len(model.mentions))).long()
    for b, (name, (expert, _)) in enumerate(matcher.surveyed().items()):
        own = of_expert(model, name, expert, model.index)
        own = RankedModel(expert, own.mentions.take(row_M), own.index, model.gold_row_M[row_M])
        with torch.no_grad():
            scores_ME = torch.cat([scores_ME for _, scores_ME in scored_by_tile(own, device)])
        matcher.get_buffer("scale_B")[b] = fit_scale(scores_ME, own.gold_row_M.to(scores_ME.device))


def prepared_split(
    matcher: FusedMatcher, split: SplitFeatures, index: EntityIndex, device: torch.device
) -> RankedModel:
    """A split's mentions and the whole kb, ready to be scored on the device."""
    mentions = prepare_in_tiles(matcher, split.mentions, "mentions", device)
    model = RankedModel(matcher, mentions, index, split.gold_row_M, tuple(matcher.surveyed()))
    return model.ready(device, RankOptions(), lambda line: None)


@torch.no_grad()
def _known(model: RankedModel, gate: FusionGate, device: torch.device) -> _Known:
    found = survey(model, device)
    scores = [
        scale * of_expert(model, name, expert, model.index).gold_scores(model.index.under(name), device)
        for name, (expert, scale) in model.matcher.surveyed().items()
    ]
    log_p_MB = torch.stack(scores, dim=1) - found.log_normaliser_MB
    inputs_MF = gate.inputs(model.mentions.under("gate").to(torch.device("cpu")), found)
    return _Known(model, found, inputs_MF.to(device), log_p_MB.float().to(device))


def _losses(gate: FusionGate, inputs_MF: Tensor, log_p_MB: Tensor) -> Tensor:
    """-log sum over experts of pi p(gold), of each mention."""
    return -torch.logsumexp(gate(inputs_MF) + log_p_MB, dim=1)


class _GateObjective(PartObjective):
    """The likelihood of the golds under the mixture."""

    def __init__(self, matcher: FusedMatcher, gate: FusionGate, known: _Known) -> None:
        self.module: FusedMatcher = matcher
        self._gate, self._known = gate, known

    def backward(self, batch: Tensor, device: torch.device, scale: Scale) -> BatchSums:
        loss_M = _losses(self._gate, self._known.inputs_MF[batch], self._known.log_p_MB[batch])
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
