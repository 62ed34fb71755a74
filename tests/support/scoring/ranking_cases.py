"""Matchers of every form with prepared items, to compare rankings."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dsmip.config import ExperimentConfig
from dsmip.data.table import Table
from dsmip.encoders.base import feature_sizes
from dsmip.evaluation.index import EntityIndex
from dsmip.evaluation.ranking import RankedModel, rank
from dsmip.evaluation.ranks import Ranking
from dsmip.evaluation.tiles import TileSize
from dsmip.models.dsmip import Dsmip
from dsmip.models.mimic import MimicMatcher
from dsmip.units.matcher import Matcher, Scores
from dsmip.units.unit_scorer import UnitScorer
from tests.support.scoring.matchers import CPU
from tests.support.scoring.systems import whole


def build_mimic(config: ExperimentConfig) -> Matcher:
    sizes, masked = feature_sizes(config.backbone.architecture), config.system.mask_padding
    return MimicMatcher(UnitScorer(("text", "image"), sizes, 8, mask_padding=masked))


FORMS: dict[str, Callable[[ExperimentConfig], Matcher]] = {
    "pair": lambda config: whole(config, final_activation="relu"),
    "mention": lambda config: whole(config, choice="mention", calibration="scale"),
    "text": lambda config: Dsmip.build_part("text", config, with_encoder=False),
    "multimodal": lambda config: Dsmip.build_part("multimodal", config, with_encoder=False),
    "mimic": build_mimic,
}
GATED = ("pair", "mention")
EXPERTS = ("text", "visual", "multimodal")


@dataclass(frozen=True)
class Case:
    """A matcher with prepared items. choices: the experts of a gate."""

    matcher: Matcher
    mentions: Table
    entities: Table
    choices: tuple[str, ...] = ()

    @torch.no_grad()
    def score(self) -> Scores:
        return self.matcher.score(self.mentions, self.entities)

    def rank(self, gold_row_M: Tensor, tiles: TileSize, top_k: int) -> Ranking:
        # several tables, as in an index on disk
        index = EntityIndex([self.entities.rows(slice(0, 40)), self.entities.rows(slice(40, None))])
        return rank(self.against(index, gold_row_M), CPU, top_k=top_k, tile_size=tiles)

    def against(self, index: EntityIndex, gold_row_M: Tensor) -> RankedModel:
        return RankedModel(self.matcher, self.mentions, index, gold_row_M, self.choices)

    def golds(self) -> Tensor:
        """Best entities, and for every third mention any."""
        best_M, number_M = self.score().total_ME.argmax(dim=1), torch.arange(len(self.mentions))
        return torch.where(number_M % 3 == 2, number_M * 7 % len(self.entities), best_M)


@torch.no_grad()
def random_matcher(form: str, config: ExperimentConfig, seed: int) -> Matcher:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        matcher = FORMS[form](config).eval()
        for parameter in matcher.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return matcher


def seen_by(form: str, table: Table) -> Table:
    """What a matcher takes of the features of all experts and the gate."""
    return table if form in GATED else table.under("multimodal" if form == "mimic" else form)


@torch.no_grad()
def case_of(form: str, matcher: Matcher, mentions: Table, entities: Table) -> Case:
    """Of features of all experts and the gate."""
    prepared = matcher.prepare_mentions(seen_by(form, mentions)), matcher.prepare_entities(seen_by(form, entities))
    return Case(matcher, *prepared, EXPERTS if form in GATED else ())


def assert_equal(found: Ranking, expected: Ranking) -> None:
    assert torch.equal(found.counts.better_M, expected.counts.better_M)
    assert torch.equal(found.counts.tied_M, expected.counts.tied_M)
    assert torch.equal(found.top_row_Mk, expected.top_row_Mk)
    assert torch.equal(found.top_score_Mk, expected.top_score_Mk)
    assert (found.choices is None) == (expected.choices is None)
    if found.choices is not None:
        for name in ("gold_M", "top_Mk", "pairs_MB", "tied_M"):
            a, b = getattr(found.choices, name), getattr(expected.choices, name)
            assert a is b or torch.equal(a, b), name
