"""Exact ranking of every mention against every entity, by counting, in tiles.

rank = 1 + number of better entities + half the number of tied ones, the gold column excluded. The gold's score is
read from the same scoring call as its column's, never from a second one: scores of two calls differ in the last bits.
`rank` decides close pairs in float64 instead (see `dsmip.evaluation.refinement`); `rank_unrefined`, for validation
while a model trains, counts them, within a band that is measured on a sample.
Scores of one tile of mentions against the whole slice are held, not of all pairs. Shapes: M mentions, E entities of
this worker's slice, B experts, k kept candidates.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dsmip.data.table import Table
from dsmip.distributed import max_over_workers, sum_over_workers, world_size
from dsmip.evaluation.index import EntityIndex
from dsmip.evaluation.ranks import Choices, Cost, NotRankable, Ranking, check_golds
from dsmip.evaluation.refinement import PairScorer, Refiner, Unrefined, sample_errors
from dsmip.ops import ranking as ops
from dsmip.progress import Progress, no_progress
from dsmip.rank_options import RankOptions
from dsmip.units.matcher import Matcher, Scores
from dsmip.units.text_unit import HalfOverflow, use_backend, use_precision

_SAMPLE_MENTIONS = 4  # whose errors are measured where nothing is refined: training waits for it after every epoch


@dataclass(frozen=True, slots=True)
class TileSize:
    """How many mentions and entities are scored at a time."""

    mentions: int
    entities: int


CPU_TILES, GPU_TILES = TileSize(128, 2048), TileSize(512, 8192)


@dataclass(frozen=True)
class RankedModel:
    """A model and all that its ranking needs.

    Attributes:
        choices: The experts that the model chooses from (may be none).
    """

    matcher: Matcher
    mentions: Table
    index: EntityIndex
    gold_row_M: Tensor
    choices: tuple[str, ...] = ()

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
        gold_score_M = self.gold_scores(self.index, device)
        return self.rank_slice(self.index, gold_score_M, device, options, notice, progress)

    def ready(self, device: torch.device, options: RankOptions, notice: Callable[[str], None]) -> "RankedModel":
        """With the matcher on the device, and what computes its token-level scores chosen."""
        matcher = self.matcher.to(device)
        backend = use_backend(matcher, options.backend, device)
        notice(f"scoring on {device} with {backend}, {use_precision(matcher, options.precision, backend)}")
        return replace(self, matcher=matcher)

    def gold_scores(self, index: EntityIndex, device: torch.device) -> Tensor:
        """float64 [M]: exact scores of the golds that are in a slice of the index, NaN elsewhere."""
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
        return rank(
            replace(self.ready(device, options, notice), index=index),
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
) -> tuple["Tiles", PairScorer]:
    """What scores tiles, and what scores single pairs exactly."""
    matcher, mentions, index = model.matcher, model.mentions, model.index
    if not len(mentions) or not (len(index) or world_size() > 1):
        raise ValueError(f"{len(mentions)} mentions against {len(index)} entities: nothing to rank")
    matcher.eval()
    index = placed(index, device, notice)
    tiles = Tiles(matcher, mentions, index, model.gold_row_M - index.first_row, device, size, notice, after_tile)
    return tiles, PairScorer(matcher, mentions, index, device, notice)


def default_tiles(device: torch.device, num_entities: int) -> TileSize:
    """Fewer mentions of a large slice, so that scores of a tile of mentions take the same memory for any slice.

    Args:
        num_entities: Of the slice; 0 where workers must all have the same tiles, though slices differ by an entity.
    """
    size, num_pairs = (CPU_TILES, 2**21) if device.type == "cpu" else (GPU_TILES, 2**26)
    return TileSize(max(min(size.mentions, num_pairs // max(num_entities, 1)), 1), size.entities)


def placed(index: EntityIndex, device: torch.device, notice: Callable[[str], None]) -> EntityIndex:
    """The index on the device; where it does not fit, its tiles go there anew for every tile of mentions."""
    try:
        return EntityIndex([table.to(device) for table in index.tables], index.first_row)
    except torch.OutOfMemoryError:
        notice(f"{device} has no memory for the whole index ({index.num_bytes / 2**30:.1f} GiB): slower, tile by tile")
        return index


@dataclass
class Tiles:
    """Mentions against an index, one tile of both at a time.

    Attributes:
        gold_column_M: Positions in the index; a gold that is not in it has a position outside.
    """

    matcher: Matcher
    mentions: Table
    index: EntityIndex
    gold_column_M: Tensor
    device: torch.device
    size: TileSize
    notice: Callable[[str], None]
    after_tile: Callable[[int], None]

    def score(self, mentions: Table, entities: Table) -> Tensor:
        """[m, e] of a few mentions and entities, as `rank` scores them."""
        return torch.cat([scores.total_ME for scores in self._score_fitting(mentions, entities)], dim=1)

    def rank(self, top_k: int, num_choices: int, close: Refiner | float) -> dict[str, Tensor]:
        """Columns of a `Ranking` for all mentions, on the CPU; rows are positions in the index.

        Args:
            close: What refines close pairs, or the band within which they are counted.
        """
        tiles = []
        for start in range(0, len(self.mentions), self.size.mentions):
            tiles.append(self._rank_tile(start, top_k, num_choices, close))
            self.after_tile(min(start + self.size.mentions, len(self.mentions)))
        return {name: torch.cat([tile[name] for tile in tiles]).cpu() for name in tiles[0]}

    def best(self, top_k: int, refiner: Refiner) -> dict[str, Tensor]:
        """Scores, positions in the index and (of a matcher that chooses) choices [M, k] of the best, on the CPU.

        Args:
            refiner: Of pairs with no gold: their scores are NaN.
        """
        tiles = []
        for start in range(0, len(self.mentions), self.size.mentions):
            scores_ME, chosen_ME, _ = self.score_all(start)
            nowhere_M = scores_ME.new_full((len(scores_ME),), torch.nan)
            refined_ME, _ = refiner.refine(scores_ME, start, nowhere_M, top_k)
            best = ops.top_k(refined_ME, min(top_k, refined_ME.shape[1]))
            tile = {"top_score": best.scores_MK, "top_row": best.rows_MK}
            if chosen_ME is not None:
                tile["chosen_top"] = chosen_ME.gather(1, best.rows_MK).long()
            tiles.append(tile)
        return {name: torch.cat([tile[name] for tile in tiles]).cpu() for name in tiles[0]}

    def _rank_tile(self, start: int, top_k: int, num_choices: int, close: Refiner | float) -> dict[str, Tensor]:
        num_entities = len(self.index)
        scores_ME, chosen_ME, counted = self.score_all(start)
        gold_column_M = self.gold_column_M[start : start + len(scores_ME)].to(self.device)
        here_M = (gold_column_M >= 0) & (gold_column_M < num_entities)
        column_M = gold_column_M.clamp(0, max(num_entities - 1, 0))
        own_M = scores_ME.gather(1, column_M[:, None])[:, 0] if num_entities else scores_ME.new_zeros(len(scores_ME))
        if isinstance(close, Refiner):
            scores_ME, gold_M = close.refine(scores_ME, start, own_M.where(here_M, torch.nan), top_k)
        else:
            self._check_slices(start, sum_over_workers(here_M.long()))
            gold_M = sum_over_workers(own_M.where(here_M, torch.zeros_like(own_M)))
            close_M = ((scores_ME - gold_M[:, None]).abs() <= close).sum(dim=1) - here_M.long()
            counted["close"] = sum_over_workers(close_M)
        better_M, tied_M = ops.count_against(scores_ME, gold_M, column_M.where(here_M, -1))
        top_score_Mk, top_row_Mk = ops.top_k(scores_ME, min(top_k, num_entities))
        tile = {
            "better": sum_over_workers(better_M),
            "tied": sum_over_workers(tied_M),
            "top_score": top_score_Mk,
            "top_row": top_row_Mk,
            **counted,
        }
        if chosen_ME is not None and num_choices:
            own_choice_M = chosen_ME.gather(1, column_M[:, None])[:, 0].long()
            tile["chosen_gold"] = own_choice_M.where(here_M, -1)
            tile["chosen_top"] = chosen_ME.gather(1, top_row_Mk).long()
            tile["chosen_pairs"] = torch.stack([(chosen_ME == b).sum(dim=1) for b in range(num_choices)], dim=1)
        return tile

    def _check_slices(self, start: int, times_M: Tensor) -> None:
        """Checks that each gold is in some worker's slice: `times_M` says in how many."""
        for mention in (times_M == 0).nonzero()[:, 0].tolist():
            row = int(self.gold_column_M[start + mention]) + self.index.first_row
            raise ValueError(f"mention {start + mention}: its gold, kb row {row}, is in no worker's index")

    def score_all(self, start: int) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """Scores [M, E], choices [M, E] or None, and columns of counts (`_counted`) of one tile of mentions."""
        mentions = self.mentions.take(slice(start, start + self.size.mentions)).to(self.device)
        totals, choices, counts, first = [torch.zeros(len(mentions), 0, device=self.device)], [], [], 0
        for entities in self.index.tiles(self.size.entities):
            for scores in self._score_fitting(mentions, entities):
                _refuse_broken(scores, start, self.index.first_row + first)
                first += scores.total_ME.shape[1]
                totals.append(scores.total_ME)
                if scores.chosen_ME is not None:
                    choices.append(scores.chosen_ME.to(torch.int8))
                counts.append(_counted(scores))
        names = counts[0] if counts else ()  # none of a worker's empty slice
        counted = {name: torch.stack([each[name] for each in counts]).sum(dim=0) for name in names}
        return torch.cat(totals, dim=1), torch.cat(choices, dim=1) if choices else None, counted

    def _score_fitting(self, mentions: Table, entities: Table) -> Iterator[Scores]:
        """Scores of a tile of entities, in smaller ones where the device has no memory for all of it.

        Where half precision cannot hold token rows, this tile and all that follow are scored in single precision.
        """
        start = 0
        while start < len(entities):
            tile = entities.rows(slice(start, start + self.size.entities))
            try:
                scores = self.matcher.score(mentions, tile.to(self.device))
            except torch.OutOfMemoryError:
                if len(tile) == 1:
                    raise
                self.size = TileSize(self.size.mentions, (len(tile) + 1) // 2)
                self.notice(f"{self.device} is out of memory: going on with tiles of {self.size.entities} entities")
                continue
            except HalfOverflow as overflow:
                use_precision(self.matcher, "fp32", "triton")
                self.notice(f"{overflow}: going on with fp32")
                continue
            yield scores
            start += len(tile)


def _counted(scores: Scores) -> dict[str, Tensor]:
    """Columns of a tile's scores that add up over tiles."""
    counted = {}
    if scores.tied_choice_ME is not None:
        counted["tied_choices"] = scores.tied_choice_ME.sum(dim=1)
    if scores.token_pairs_M2 is not None:
        counted["token_pairs"] = scores.token_pairs_M2
    return counted


def _refuse_broken(scores: Scores, first_mention: int, first_row: int) -> None:
    """Checks a tile's scores.

    Raises:
        NotRankable: One is NaN or infinite.
    """
    broken_ME = ~scores.total_ME.isfinite()
    if bool(broken_ME.any()):
        mention, entity = broken_ME.nonzero()[0].tolist()
        raise NotRankable(first_mention + mention, first_row + entity, scores.broken_part(mention, entity))


def _ranking(columns: Mapping[str, Tensor], first_row: int, cost: Cost) -> Ranking:
    choices = None
    if "chosen_gold" in columns:
        gold_M, top_Mk, pairs_MB = (columns[name] for name in ("chosen_gold", "chosen_top", "chosen_pairs"))
        choices = Choices(gold_M, top_Mk, pairs_MB, columns.get("tied_choices"))
    counts = ops.Counts(columns["better"], columns["tied"])
    return Ranking(counts, columns["top_row"] + first_row, columns["top_score"], choices, cost)
