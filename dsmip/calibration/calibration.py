"""A system's calibration: from a mention's best scores to how sure it is, fitted on validation mentions.

Two questions, one small monotone model each (`dsmip.calibration.logistic`) over the same evidence: is the best link
right, and is the mention's entity in the knowledge base at all. For the second no mention of something unknown is
needed: each validation mention is looked at twice, as it is and with its gold left out of the list. P(known) is then
stated for a world in which as many mentions mean something unknown as among the validation mentions; where those have
golds only, one in five.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from dsmip.calibration.evidence import NUM_SCORES, evidence, scale_of, without
from dsmip.calibration.logistic import fit_logistic
from dsmip.config import Frozen
from dsmip.errors import UserError
from dsmip.storage.parsing import read_json

FORMAT: Literal[1] = 1
UNKNOWN_SHARE = 0.2
MIN_MENTIONS = 20
"""Fewer validation mentions calibrate nothing; an expert with fewer shares the scale of all."""


@dataclass(frozen=True)
class BestScores:
    """What a system says of mentions: the scores of their best entities.

    Attributes:
        score_MK: float [M, K], falling.
        expert_MK: int64 [M, K], which expert gave each; zeros where there is no choice.
    """

    score_MK: Tensor
    expert_MK: Tensor

    def __len__(self) -> int:
        return len(self.score_MK)

    def without(self, is_left_out_MK: Tensor) -> "BestScores":
        """With one entity of each mention left out, or its last one (see `dsmip.calibration.evidence.without`)."""
        return BestScores(without(self.score_MK, is_left_out_MK), without(self.expert_MK, is_left_out_MK))

    def first(self, k: int) -> "BestScores":
        return BestScores(self.score_MK[:, :k], self.expert_MK[:, :k])


class Head(Frozen):
    """A fitted logistic model: weights of the standardised evidence, and an intercept for each expert."""

    weights: tuple[float, ...]
    intercepts: tuple[float, ...]

    def in_a_world_of(self, share: float, *, fitted_with: float) -> "Head":
        """The same evidence where a `share` of all targets is 0, after a fit on examples with another share of them."""
        if not 0 < fitted_with < 1:
            return self
        shift = math.log((1 - share) / share) - math.log((1 - fitted_with) / fitted_with)
        return Head(weights=self.weights, intercepts=tuple(each + shift for each in self.intercepts))


class Calibration(Frozen):
    """Probabilities from best scores; a file of its own beside the system's weights.

    Attributes:
        system: The name of what gave the scores.
        index: Of the entities that the scores are of; those of another one are not calibrated by this.
        mentions, unknown: Validation mentions that it was fitted on, with a gold and without.
        unknown_share: Of all mentions, how many mean something that is not in the knowledge base: what P(known) says
            depends on it.
        experts: Which the system chooses from; one without a name where it does not.
        num_scores: How many of the best scores it reads.
        scales: The unit of each expert's scores.
        means, deviations: Of each expert's evidence, in the order of EVIDENCE.
        right, known: The two models.
        min_known: A mention with less counts as one of something that is not in the knowledge base: below a half, that
            is likelier.
    """

    format: Literal[1] = FORMAT
    system: str
    index: str
    mentions: int
    unknown: int
    unknown_share: float = Field(gt=0, lt=1)
    experts: tuple[str, ...]
    num_scores: int = Field(ge=1)
    scales: tuple[float, ...]
    means: tuple[tuple[float, ...], ...]
    deviations: tuple[tuple[float, ...], ...]
    right: Head
    known: Head
    min_known: float = Field(0.5, ge=0, le=1)

    @staticmethod
    def fit(
        system: str,
        index: str,
        experts: tuple[str, ...],
        best: BestScores,
        is_gold_MK: Tensor,
        unknown: BestScores | None = None,
    ) -> "Calibration":
        """Fits both models on validation mentions; the same at every call.

        Args:
            system: Its name.
            index: The name of the index that they were made with.
            experts: What it chooses from, or nothing.
            best: Of mentions whose gold is in the knowledge base.
            is_gold_MK: bool [M, K], which of the kept entities is the gold.
            unknown: Of mentions whose entity is not in the knowledge base, where there are any.

        Raises:
            UserError: There are too few mentions.
        """
        if len(best) < MIN_MENTIONS:
            raise UserError(
                f"{len(best)} validation mentions are too few to calibrate {system}: {MIN_MENTIONS} at least"
            )
        experts = experts or ("",)
        num_scores = min(NUM_SCORES, max(best.score_MK.shape[1] - 1, 1))
        seen = best.first(num_scores)
        units = _Units.of(seen, len(experts))
        strangers = [] if unknown is None else [unknown.first(num_scores)]
        left_out = [best.without(is_gold_MK).first(num_scores)] if best.score_MK.shape[1] > 1 else []
        right = units.fitted([seen, *strangers], _targets(is_gold_MK[:, 0], strangers))
        is_known_N = _targets(torch.ones(len(seen), dtype=torch.bool), [*left_out, *strangers])
        known = units.fitted([seen, *left_out, *strangers], is_known_N)
        num_unknown = sum(map(len, strangers))
        share = num_unknown / (len(best) + num_unknown) if num_unknown else UNKNOWN_SHARE
        return Calibration(
            system=system,
            index=index,
            mentions=len(best),
            unknown=num_unknown,
            unknown_share=share,
            experts=experts,
            num_scores=num_scores,
            scales=tuple(units.scale_E.tolist()),
            means=tuple(map(tuple, units.mean_EF.tolist())),
            deviations=tuple(map(tuple, units.deviation_EF.tolist())),
            right=right,
            known=known.in_a_world_of(share, fitted_with=float((~is_known_N).double().mean())),
        )

    def probabilities(self, best: BestScores) -> tuple[Tensor, Tensor]:
        """float64 [M] each: that the best link is right, and that the mention's entity is in the knowledge base."""
        best = best.first(self.num_scores)
        units = _Units(
            *(torch.tensor(each, dtype=torch.float64) for each in (self.scales, self.means, self.deviations))
        )
        return units.probability(self.right, best), units.probability(self.known, best)


def read_calibration(path: Path) -> Calibration:
    """A stored one.

    Raises:
        UserError: The file is damaged, or of another version.
    """
    remedy = f"; remove {path}, and 'dsmip calibrate' makes it again"
    return read_json(path, lambda it: Calibration.model_validate_json(json.dumps(it)), remedy)


def _targets(first_M: Tensor, no: list[BestScores]) -> Tensor:
    """bool [N]: those of the first mentions, and False for all others."""
    return torch.cat([first_M, torch.zeros(sum(map(len, no)), dtype=torch.bool)])


@dataclass(frozen=True)
class _Units:
    """What makes the evidence of all experts comparable: float64 [E], [E, F] and [E, F]."""

    scale_E: Tensor
    mean_EF: Tensor
    deviation_EF: Tensor

    @staticmethod
    def of(best: BestScores, num_experts: int) -> "_Units":
        """Each expert's, of the mentions whose best entity it scored; of all mentions where these are few."""
        units = []
        for expert in range(num_experts):
            score_MK = best.score_MK[best.expert_MK[:, 0] == expert]
            score_MK = score_MK if len(score_MK) >= MIN_MENTIONS else best.score_MK
            scale = torch.tensor(scale_of(score_MK), dtype=torch.float64)
            evidence_MF = evidence(score_MK, scale.expand(len(score_MK)))
            deviation_F = evidence_MF.std(dim=0)
            units.append((scale, evidence_MF.mean(dim=0), deviation_F.where(deviation_F > 1e-9, 1.0)))
        scales, means, deviations = zip(*units, strict=True)
        return _Units(torch.stack(scales), torch.stack(means), torch.stack(deviations))

    def evidence(self, best: BestScores) -> Tensor:
        """float64 [M, F], of about mean 0 and deviation 1 for each expert."""
        expert_M = best.expert_MK[:, 0]
        raw_MF = evidence(best.score_MK, self.scale_E[expert_M])
        return (raw_MF - self.mean_EF[expert_M]) / self.deviation_EF[expert_M]

    def fitted(self, parts: list[BestScores], target_N: Tensor) -> Head:
        evidence_NF = torch.cat([self.evidence(each) for each in parts])
        expert_N = torch.cat([each.expert_MK[:, 0] for each in parts])
        weights_F, intercepts_E = fit_logistic(evidence_NF, expert_N, target_N.double(), len(self.scale_E))
        return Head(weights=tuple(weights_F.tolist()), intercepts=tuple(intercepts_E.tolist()))

    def probability(self, head: Head, best: BestScores) -> Tensor:
        """float64 [M]."""
        weights_F, intercepts_E = (torch.tensor(each, dtype=torch.float64) for each in (head.weights, head.intercepts))
        return (self.evidence(best) @ weights_F + intercepts_E[best.expert_MK[:, 0]]).sigmoid()
