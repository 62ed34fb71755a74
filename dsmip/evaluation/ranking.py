"""Exact ranking of every mention against every entity, by counting, in tiles.

rank = 1 + number of better entities + half the number of tied ones, the gold column excluded. `rank` decides close
pairs in float64 (see `dsmip.evaluation.refinement`); `rank_unrefined`, for validation while a model trains, counts
them, within a band that is measured on a sample. Shapes: M mentions, E entities of this worker's slice, k kept
candidates.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dsmip.data.table import Table
from dsmip.distributed import max_over_workers, world_size
from dsmip.evaluation.index import EntityIndex
from dsmip.evaluation.ranks import Choices, Cost, Ranking, check_golds
from dsmip.evaluation.refinement import PairScorer, Refiner, Unrefined, sample_errors
from dsmip.evaluation.tiles import Tiles, TileSize, default_tiles, placed
from dsmip.ops import ranking as ops
from dsmip.progress import Progress, no_progress
from dsmip.rank_options import RankOptions
from dsmip.units.matcher import Matcher
from dsmip.units.text_unit import use_backend, use_precision

_SAMPLE_MENTIONS = 4  # whose errors are measured where nothing is refined: training waits for it after every epoch


@dataclass(frozen=True)
class RankedModel:
    """A model and all that its ranking needs.

    Attributes:
        choices: The experts that the model chooses from (may be none).
        expert_scores: Of fused experts, by name [M, E] against `index`, where the first pass has kept them.
    """

    matcher: Matcher
    mentions: Table
    index: EntityIndex
    gold_row_M: Tensor
    choices: tuple[str, ...] = ()
    expert_scores: Mapping[str, Tensor] = field(default_factory=dict)

    def rank(
        self,
        device: torch.device,
        options: RankOptions = RankOptions(),
        notice: Callable[[str], None] = lambda line: None,
        progress: Progress = no_progress,
    ) -> Ranking:
        """Exact ranks and the best entities of all mentions.

        Raises:
            UserError: An option cannot be had.
        """
        model = self.ready(device, options, notice)
        return model._ranked(model.gold_scores(self.index, device), device, options, notice, progress)

    def ready(self, device: torch.device, options: RankOptions, notice: Callable[[str], None]) -> "RankedModel":
        """With the matcher on the device, and what computes its token-level scores chosen."""
        matcher = self.matcher.to(device)
        backend = use_backend(matcher, options.backend, device)
        notice(f"scoring on {device} with {backend}, {use_precision(matcher, options.precision, backend)}")
        return replace(self, matcher=matcher)

    def gold_scores(self, index: EntityIndex, device: torch.device) -> Tensor:
        """float64 [M]: exact scores of the golds that are in a slice of the index, NaN elsewhere.

        Close pairs are compared with them: both should be of a model that is `ready` in the same way.
        """
        return PairScorer(self.matcher, self.mentions, index, device).gold_scores(self.gold_row_M)

    @torch.no_grad()
    def broken_part(self, mention: int, row: int) -> str | None:
        """Which expert or unit scores a mention and a kb row as NaN or infinite; None if that pair alone is sound."""
        device = next((each.device for each in self.matcher.parameters()), torch.device("cpu"))  # some have none
        entity = self.index.take(torch.tensor([row - self.index.first_row])).to(device)
        scores = self.matcher.eval().score(self.mentions.take(torch.tensor([mention])).to(device), entity)
        return None if bool(scores.total_ME.isfinite().all()) else scores.broken_part(0, 0)

    def rank_slice(
        self,
        index: EntityIndex,
        gold_score_M: Tensor,
        device: torch.device,
        options: RankOptions = RankOptions(),
        notice: Callable[[str], None] = lambda line: None,
        progress: Progress = no_progress,
    ) -> Ranking:
        """The ranking against a slice of the index, given all golds' exact scores."""
        model = replace(self.ready(device, options, notice), index=index)
        return model._ranked(gold_score_M, device, options, notice, progress)

    def _ranked(
        self,
        gold_score_M: Tensor,
        device: torch.device,
        options: RankOptions,
        notice: Callable[[str], None],
        progress: Progress,
    ) -> Ranking:
        return rank(
            self,
            device,
            top_k=options.top_k,
            gold_score_M=gold_score_M,
            notice=notice,
            after_tile=lambda done: progress("ranked mentions", done, len(self.mentions)),
        )


@torch.no_grad()
def rank(
    model: RankedModel,
    device: torch.device,
    *,
    top_k: int = 0,
    gold_score_M: Tensor | None = None,
    tile_size: TileSize | None = None,
    notice: Callable[[str], None] = lambda line: None,
    after_tile: Callable[[int], None] = lambda num_mentions: None,
) -> Ranking:
    """Exact ranks: close pairs are scored again in float64, so neither tiles nor slices of the kb change a rank.

    Slices of the kb are ranked on their own, each with all golds' scores; `merge_rankings` puts them together.

    Args:
        model: Its index may be a slice of the kb.
        device: Where pairs are scored.
        top_k: Number of best entities to keep (at most all).
        gold_score_M: float64 [M], exact scores of all golds (`RankedModel.gold_scores`); None: all are in the index.
        tile_size: Default: what suits the device.
        notice: Takes lines about memory.
        after_tile: Called with the number of mentions that are ranked so far.

    Raises:
        NotRankable: A score is NaN or infinite.
        ValueError: No mentions, no entities, or a gold that is not in the index and whose score is not given.
    """
    tiles, pairs = _opened(model, device, tile_size or default_tiles(device, len(model.index)), notice, after_tile)
    gold_score_M = pairs.gold_scores(model.gold_row_M) if gold_score_M is None else gold_score_M
    first_row = model.index.first_row
    check_golds(gold_score_M, model.gold_row_M, range(first_row, first_row + len(model.index)))
    refiner = Refiner(pairs, gold_score_M)
    columns = tiles.rank(top_k, len(model.choices), refiner)
    while not refiner.band_held:
        refiner.widen()
        columns = tiles.rank(top_k, len(model.choices), refiner)
    return _ranking(columns, first_row, Cost(columns.get("token_pairs"), refiner.report()))


@torch.no_grad()
def rank_unrefined(
    model: RankedModel,
    device: torch.device,
    *,
    top_k: int = 0,
    tile_size: TileSize | None = None,
    notice: Callable[[str], None] = lambda line: None,
    after_tile: Callable[[int], None] = lambda num_mentions: None,
) -> Ranking:
    """Ranks by the scores' own precision, off by at most the number of pairs within a band of the gold (`Unrefined`).

    With a process group every worker passes all mentions and the index of its own slice of the kb, or an empty one;
    counts are summed, and `top_k` must be 0. Arguments and errors are those of `rank`; a gold must be in some index.
    """
    # workers must all have the same tiles, though their slices differ by an entity
    tiles, pairs = _opened(model, device, tile_size or default_tiles(device, 0), notice, after_tile)
    own = sample_errors(pairs, tiles.score, tiles.gold_column_M, _SAMPLE_MENTIONS).band if len(model.index) else 0.0
    band = max_over_workers(own, device)
    columns = tiles.rank(top_k, len(model.choices), band)
    unrefined = Unrefined(band, columns["close"])
    return _ranking(columns, model.index.first_row, Cost(columns.get("token_pairs"), unrefined=unrefined))


def _opened(
    model: RankedModel,
    device: torch.device,
    size: TileSize,
    notice: Callable[[str], None],
    after_tile: Callable[[int], None],
) -> tuple[Tiles, PairScorer]:
    """What scores tiles, and what scores single pairs exactly."""
    matcher, mentions, index = model.matcher, model.mentions, model.index
    if not len(mentions) or not (len(index) or world_size() > 1):
        raise ValueError(f"{len(mentions)} mentions against {len(index)} entities: nothing to rank")
    matcher.eval()
    if not model.expert_scores:  # else only close pairs are taken from it
        index = placed(index, device, notice)
    gold_column_M = model.gold_row_M - index.first_row
    tiles = Tiles(matcher, mentions, index, gold_column_M, device, size, notice, after_tile, model.expert_scores)
    return tiles, PairScorer(matcher, mentions, index, device, notice)


def _ranking(columns: Mapping[str, Tensor], first_row: int, cost: Cost) -> Ranking:
    choices = None
    if "chosen_gold" in columns:
        gold_M, top_Mk, pairs_MB = (columns[name] for name in ("chosen_gold", "chosen_top", "chosen_pairs"))
        choices = Choices(gold_M, top_Mk, pairs_MB, columns.get("tied_choices"))
    counts = ops.Counts(columns["better"], columns["tied"])
    return Ranking(counts, columns["top_row"] + first_row, columns["top_score"], choices, cost)
