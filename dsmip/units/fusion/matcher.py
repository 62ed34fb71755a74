"""Experts fused over the whole knowledge base: calibrated mean, product, and a gate that sees how sure each expert is.

What a pair scores depends on the mention's scores against all entities (the experts' normalisers, tops and so on), so
a ranking has two passes: `dsmip.evaluation.experts.survey` collects them for each expert, `FusedMatcher.informed` makes
columns of the mentions' table from them, and then pairs are scored like any other, or `fused` from what the first pass
has kept. M mentions, E entities, B experts.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, cast

import torch
from torch import Tensor, nn

from dsmip.data.collate import ItemBatch
from dsmip.data.table import Table
from dsmip.encoders.base import Side
from dsmip.ops.experts.fusion import mixture_scores, product_scores
from dsmip.ops.experts.statistics import Survey
from dsmip.units.expert import Expert
from dsmip.units.fusion.gate import FusionGate
from dsmip.units.matcher import BatchGold, Matcher, Scores

ScoringName = Literal["choice", "mixture", "product"]
_GATE, _FUSION = "gate", "fusion"


class FusedMatcher(Matcher):
    """Frozen experts as distributions over all entities, and how they are put together.

    `choice`: the scores of the likeliest expert of the mention; `mixture`: log sum pi p; `product`: sum pi log p.

    Attributes:
        gate: None: all experts count alike (the mean and the product of experts).
        calibrated: `scale_B` is fitted before the gate is trained.
        scale_B: On each expert's scores, one over its temperature.
    """

    scale_B: Tensor

    def __init__(
        self,
        experts: Mapping[str, Expert],
        scoring: ScoringName,
        gate: FusionGate | None = None,
        *,
        calibrated: bool = True,
    ) -> None:
        super().__init__()
        self.experts = nn.ModuleDict(experts)
        self.experts.requires_grad_(False)
        self.scoring, self.gate, self.calibrated = scoring, gate, calibrated
        self.register_buffer("scale_B", torch.ones(len(experts)))

    def surveyed(self) -> Mapping[str, tuple[Matcher, float]]:
        scales = self.scale_B.tolist()
        return {name: (expert, scales[b]) for b, (name, expert) in enumerate(self._experts().items())}

    def informed(self, mentions: Table, survey: Survey) -> Table:
        """With columns `fusion.log_pi` and `fusion.log_normaliser` [M, B]."""
        log_normaliser_MB = survey.log_normaliser_MB
        log_pi_MB = torch.full_like(log_normaliser_MB, len(self.experts)).log().neg()
        if self.gate is not None:
            device = self.scale_B.device
            log_pi_MB = self.gate(self.gate.inputs(mentions.under(_GATE), survey).to(device)).double().cpu()
        columns = {"log_pi": log_pi_MB, "log_normaliser": log_normaliser_MB}
        return mentions.merged(Table(columns).prefixed(_FUSION))

    def encode_mentions(self, batch: ItemBatch) -> Table:
        raise RuntimeError("the fused system scores cached features; encode with its parts")

    def encode_entities(self, batch: ItemBatch) -> Table:
        raise RuntimeError("the fused system scores cached features; encode with its parts")

    def prepare_mentions(self, features: Table) -> Table:
        """The experts' tables; where the gate sees the item, its features as they are."""
        prepared = self._prepare(features, "prepare_mentions")
        seen = features.under(_GATE) if self.gate is not None and self.gate.sees_items else Table({})
        return prepared.merged(seen.prefixed(_GATE))

    def prepare_entities(self, features: Table) -> Table:
        return self._prepare(features, "prepare_entities")

    @torch.no_grad()
    def score(self, mentions: Table, entities: Table, *, noise: Tensor | None = None) -> Scores:
        """Scores of mentions that are `informed`. The expert of the largest pi counts as the one that was chosen."""
        chosen_M = _fusion_of(mentions).dense("log_pi").argmax(dim=1)
        scores = {}
        for b, (name, expert) in enumerate(self._experts().items()):
            own, others = mentions.under(name), entities.under(name)
            if self.scoring == "choice":
                row_m = (chosen_M == b).nonzero()[:, 0]
                total_mE = expert.score(own.rows(row_m), others).total_ME
                scores[name] = total_mE.new_zeros(len(mentions), len(entities)).index_copy(0, row_m, total_mE)
            else:
                scores[name] = expert.score(own, others).total_ME
        return self.fused(mentions, scores)

    @torch.no_grad()
    def fused(self, mentions: Table, scores: Mapping[str, Tensor]) -> Scores:
        fusion = _fusion_of(mentions)
        log_pi_MB, log_normaliser_MB = fusion.dense("log_pi"), fusion.dense("log_normaliser")
        chosen_M = log_pi_MB.argmax(dim=1)
        parts = self._log_p(scores, log_normaliser_MB)
        if self.scoring == "choice":
            parts = {
                name: part_ME.masked_fill((chosen_M != b)[:, None], 0.0)
                for b, (name, part_ME) in enumerate(parts.items())
            }
        log_p_BME = torch.stack(list(parts.values()))
        chosen_ME = chosen_M[:, None].expand(log_p_BME.shape[1:])
        if self.scoring == "choice":
            total_ME = log_p_BME.gather(0, chosen_ME[None])[0]
        else:
            fuse = mixture_scores if self.scoring == "mixture" else product_scores
            total_ME = fuse(log_p_BME, log_pi_MB.to(log_p_BME.dtype))
        total_ME = total_ME.masked_fill(log_pi_MB.isnan().any(dim=1)[:, None], torch.nan)  # argmax would choose anyhow
        if self.gate is None:
            return Scores(total_ME, parts=parts)
        best_M2 = log_pi_MB.topk(min(2, len(parts)), dim=1).values
        tied_ME = (best_M2[:, 0] == best_M2[:, -1])[:, None].expand(total_ME.shape)
        return Scores(total_ME, chosen_ME, parts, tied_ME)  # no token-level score is spared: the first pass has all

    @torch.no_grad()
    def part_scores(self, mentions: Table, entities: Table) -> Mapping[str, Tensor]:
        """Log probabilities over the whole knowledge base."""
        log_normaliser_MB = _fusion_of(mentions).dense("log_normaliser")
        scores = {
            name: expert.score(mentions.under(name), entities.under(name)).total_ME
            for name, expert in self._experts().items()
        }
        return self._log_p(scores, log_normaliser_MB)

    def _log_p(self, scores: Mapping[str, Tensor], log_normaliser_MB: Tensor) -> dict[str, Tensor]:
        """Each expert's log probabilities [M, E] over the whole knowledge base, in the experts' order."""
        return {
            name: scores[name] * self.scale_B[b].to(scores[name].dtype)
            - log_normaliser_MB[:, b, None].to(scores[name].dtype)
            for b, name in enumerate(self.experts)
        }

    def image_columns(self, prepared: Table) -> list[str]:
        return [
            f"{name}.{column}"
            for name, expert in self._experts().items()
            for column in expert.image_columns(prepared.under(name))
        ]

    def global_vectors(self, prepared: Table, side: Side) -> Tensor:
        """The experts' vectors side by side [N, g], a mention's times scale and pi (one or 0 where one is chosen).

        Of a mixture this leaves out that probabilities are added, not their logarithms.
        """
        vectors = [expert.global_vectors(prepared.under(name), side) for name, expert in self._experts().items()]
        if side == "mentions":
            pi_MB = prepared.dense(f"{_FUSION}.log_pi").exp()
            if self.scoring == "choice":
                pi_MB = nn.functional.one_hot(pi_MB.argmax(dim=1), pi_MB.shape[1]).to(pi_MB.dtype)
            factor_BM = (pi_MB * self.scale_B).T.to(vectors[0].dtype)
            vectors = [factor_M[:, None] * own for factor_M, own in zip(factor_BM, vectors, strict=True)]
        return torch.cat(vectors, dim=-1)

    def loss(self, mentions: Table, entities: Table, gold: BatchGold) -> Tensor:
        raise RuntimeError("the fused system has no loss of a batch: its gate learns from whole rankings")

    def encoder_trains(self) -> bool:
        return False

    def _experts(self) -> dict[str, Expert]:
        return {name: cast(Expert, expert) for name, expert in self.experts.items()}

    def _prepare(self, features: Table, method: str) -> Table:
        prepared: Sequence[Table] = [
            getattr(expert, method)(features.under(name)).prefixed(name) for name, expert in self._experts().items()
        ]
        return Table({name: column for table in prepared for name, column in table.columns.items()})


def _fusion_of(mentions: Table) -> Table:
    """What mentions know of their survey."""
    fusion = mentions.under(_FUSION)
    if not fusion.columns:
        raise RuntimeError("fused experts score mentions that are surveyed (dsmip.evaluation.experts.survey)")
    return fusion
