"""Exact ranking of every mention against every entity, by counting, in tiles.

rank = 1 + number of better entities + half the number of tied ones, the gold column excluded. The gold's score is
read from the same scoring call as its column's, never from a second one: scores of two calls differ in the last bits.
With `refine` close pairs are decided in float64 instead (see `dsmip.evaluation.refinement`); without it they are
counted, within a band that is measured on a sample.
Scores of one tile of mentions against the whole slice are held, not of all pairs. Shapes: M mentions, E entities of
this worker's slice, B experts, k kept candidates.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dsmip.config import RankOptions
from dsmip.data.table import Table
from dsmip.distributed import max_over_workers, sum_over_workers
from dsmip.evaluation.index import EntityIndex
from dsmip.evaluation.metrics import summarise
from dsmip.evaluation.refinement import PairScorer, Refinement, Refiner, Unrefined, sample_errors
from dsmip.ops import ranking as ops
from dsmip.progress import Progress, no_progress
from dsmip.units.matcher import Matcher, Scores
from dsmip.units.text_unit import HalfOverflow, use_backend, use_precision

_SAMPLE_MENTIONS = 4  # whose errors are measured where nothing is refined: training waits for it after every epoch


@dataclass(frozen=True)
class Ranking:
    """Where each mention's gold landed (CPU tensors).

    counts: better and tied entities, int64 [M] each. top_row_Mk, top_score_Mk: best k entities. chosen_*: index of the
    expert that scored the gold pair, the top-k pairs, and the number of pairs per expert; None for a matcher that
    makes no choice (-1: the gold is of another slice). tied_choices_M: number of pairs for which another expert was as
    good a choice. token_pairs_M2: as in `Scores`, of all tiles. refinement: what scoring close pairs
    again took; None when they were not, and then unrefined: how many there are.
    """

    counts: ops.Counts
    top_row_Mk: Tensor
    top_score_Mk: Tensor
    chosen_gold_M: Tensor | None = None
    chosen_top_Mk: Tensor | None = None
    chosen_pairs_MB: Tensor | None = None
    tied_choices_M: Tensor | None = None
    token_pairs_M2: Tensor | None = None
    refinement: Refinement | None = None
    unrefined: Unrefined | None = None

    @property
    def rank_M(self) -> Tensor:
        """Realistic ranks, float64 [M]."""
        return ops.realistic_ranks(self.counts)

    def metrics(self, rows: Tensor | None = None) -> dict[str, float]:
        """hits@k, MRR and mean ranks over all mentions or over the chosen `rows` (bool [M])."""
        chosen = slice(None) if rows is None else rows
        return summarise(ops.Counts(self.counts.better_M[chosen], self.counts.tied_M[chosen]))


@dataclass(frozen=True, slots=True)
class TileSize:
    """How many mentions and entities are scored at a time."""

    mentions: int
    entities: int


CPU_TILES, GPU_TILES = TileSize(128, 2048), TileSize(512, 8192)


class NotRankable(ValueError):
    """A score is NaN, which compares false with everything and would rank first, or infinite.

    part: the expert or unit that it comes from (`Scores.broken_part`), where that is known.
    """

    def __init__(self, mention: int, entity_row: int, part: str | None = None) -> None:
        super().__init__(mention, entity_row, part)  # what a process hands to another
        self.mention, self.entity_row, self.part = mention, entity_row, part

    def __str__(self) -> str:
        of_part = f" ({self.part})" if self.part else ""
        pair = f"mention {self.mention} and entity row {self.entity_row}"
        return f"the score of {pair} is NaN or infinite{of_part}: no ranking"


@dataclass(frozen=True)
class RankedModel:
    """A model and all that its ranking needs. choices: the experts that the model chooses from (may be none)."""

    matcher: Matcher
    mentions: Table
    index: EntityIndex
    gold_row_M: Tensor
    choices: tuple[str, ...]

    def rank(
        self,
        device: torch.device,
        options: RankOptions = RankOptions(),
        notice: Callable[[str], None] = print,
        progress: Progress = no_progress,
    ) -> Ranking:
        """Exact ranks and the best entities of all mentions. Raises UserError when an option cannot be had."""
        gold_score_M = self.gold_scores(self.index, device)
        return self.rank_slice(self.index, gold_score_M, device, options, notice, progress)

    def gold_scores(self, index: EntityIndex, device: torch.device) -> Tensor:
        """float64 [M]: exact scores of the golds that are in a slice of the index, NaN elsewhere."""
        return PairScorer(self.matcher, self.mentions, index, device).gold_scores(self.gold_row_M)

    @torch.no_grad()
    def broken_part(self, mention: int, row: int) -> str | None:
        """Which expert or unit scores a mention and a kb row as NaN or infinite; None if that pair alone is sound."""
        device = next(self.matcher.parameters()).device
        entity = self.index.take(torch.tensor([row - self.index.first_row])).to(device)
        scores = self.matcher.eval().score(self.mentions.take(torch.tensor([mention])).to(device), entity)
        return None if bool(scores.total_ME.isfinite().all()) else scores.broken_part(0, 0)

    def rank_slice(
        self,
        index: EntityIndex,
        gold_score_M: Tensor,
        device: torch.device,
        options: RankOptions = RankOptions(),
        notice: Callable[[str], None] = print,
        progress: Progress = no_progress,
    ) -> Ranking:
        """The ranking against a slice of the index, given all golds' exact scores."""
        matcher = self.matcher.to(device)
        backend = use_backend(matcher, options.backend, device)
        notice(f"scoring on {device} with {backend}, {use_precision(matcher, options.precision, backend)}")
        return rank(
            matcher,
            self.mentions,
            index,
            self.gold_row_M,
            device=device,
            top_k=options.top_k,
            num_choices=len(self.choices),
            refine=True,
            gold_score_M=gold_score_M,
            notice=notice,
            progress=lambda done: progress("ranked mentions", done, len(self.mentions)),
        )


@torch.no_grad()
def rank(
    matcher: Matcher,
    mentions: Table,
    index: EntityIndex,
    gold_row_M: Tensor,
    *,
    device: torch.device,
    top_k: int = 0,
    num_choices: int = 0,
    refine: bool = False,
    gold_score_M: Tensor | None = None,
    tile_size: TileSize | None = None,
    notice: Callable[[str], None] = lambda text: None,
    progress: Callable[[int], None] = lambda num_mentions: None,
) -> Ranking:
    """Ranks prepared `mentions` against the entities of `index`.

    gold_row_M: kb rows int64 [M]. top_k: number of best entities to keep (at most all). num_choices: B when experts are
    chosen. refine: close pairs are scored again in float64, so that neither tiles nor slices of the kb change a rank.
    Without it a rank may be off by the number of pairs within a band of the gold, which are counted (`Unrefined`).

    Slices of the kb: with a process group every worker passes all mentions and the index of its own slice, counts are
    added up, `top_k` must be 0 and `refine` off. Elsewhere each slice is ranked on its own, with `refine` and
    `gold_score_M` (all golds' scores, from `PairScorer`), and `dsmip.evaluation.slices` puts them together.

    tile_size: default: what suits the device. notice: takes lines about memory. progress: called with the number of
    mentions that are ranked.

    Raises NotRankable when a score is NaN or infinite; ValueError when a gold is in no slice that is known of, and
    for no mentions or no entities.
    """
    if not (len(mentions) and len(index)):
        raise ValueError(f"{len(mentions)} mentions against {len(index)} entities: nothing to rank")
    matcher.eval()
    index = _placed(index, device, notice)
    size = tile_size or _default_tiles(device, len(index) if refine else 0)
    tiles = _Tiles(matcher, mentions, index, gold_row_M - index.first_row, device, size, notice, progress)
    pairs = PairScorer(matcher, mentions, index, device, notice)
    if not refine:
        sample = sample_errors(pairs, tiles.score, tiles.gold_column_M, _SAMPLE_MENTIONS)
        band = max_over_workers(sample.band, device)
        return _ranking(tiles.rank(top_k, num_choices, band), index.first_row, band)
    gold_score_M = pairs.gold_scores(gold_row_M) if gold_score_M is None else gold_score_M
    check_golds(gold_score_M, gold_row_M, range(index.first_row, index.first_row + len(index)))
    refiner = Refiner(pairs, gold_score_M)
    columns = tiles.rank(top_k, num_choices, refiner)
    while not refiner.band_held:
        refiner.widen()
        columns = tiles.rank(top_k, num_choices, refiner)
    return _ranking(columns, index.first_row, refiner.report())


def _default_tiles(device: torch.device, num_entities: int) -> TileSize:
    """Fewer mentions of a large slice, so that scores of a tile of mentions take the same memory for any slice.

    num_entities: 0 where workers must all have the same tiles, though their slices differ by an entity.
    """
    size, num_pairs = (CPU_TILES, 2**21) if device.type == "cpu" else (GPU_TILES, 2**26)
    return TileSize(max(min(size.mentions, num_pairs // max(num_entities, 1)), 1), size.entities)


def _placed(index: EntityIndex, device: torch.device, notice: Callable[[str], None]) -> EntityIndex:
    """The index on the device; where it does not fit, its tiles go there anew for every tile of mentions."""
    try:
        return EntityIndex([table.to(device) for table in index.tables], index.first_row)
    except torch.OutOfMemoryError:
        notice(f"{device} has no memory for the whole index ({index.num_bytes / 2**30:.1f} GiB): slower, tile by tile")
        return index


@dataclass
class _Tiles:
    """Mentions against an index, one tile of both at a time.

    gold_column_M: places in the index; a gold that is not in it has a place outside.
    """

    matcher: Matcher
    mentions: Table
    index: EntityIndex
    gold_column_M: Tensor
    device: torch.device
    size: TileSize
    notice: Callable[[str], None]
    progress: Callable[[int], None]

    def score(self, mentions: Table, entities: Table) -> Tensor:
        """[m, e] of a few mentions and entities, as `rank` scores them."""
        return torch.cat([scores.total_ME for scores in self._score_fitting(mentions, entities)], dim=1)

    def rank(self, top_k: int, num_choices: int, close: Refiner | float) -> dict[str, Tensor]:
        """Columns of a `Ranking` for all mentions, on the CPU; rows are places in the index.

        close: what refines close pairs, or the band within which they are counted.
        """
        tiles = []
        for start in range(0, len(self.mentions), self.size.mentions):
            tiles.append(self._rank_tile(start, top_k, num_choices, close))
            self.progress(min(start + self.size.mentions, len(self.mentions)))
        return {name: torch.cat([tile[name] for tile in tiles]).cpu() for name in tiles[0]}

    def _rank_tile(self, start: int, top_k: int, num_choices: int, close: Refiner | float) -> dict[str, Tensor]:
        num_entities = len(self.index)
        scores_ME, chosen_ME, counted = self._score_all(start)
        gold_column_M = self.gold_column_M[start : start + len(scores_ME)].to(self.device)
        here_M = (gold_column_M >= 0) & (gold_column_M < num_entities)
        column_M = gold_column_M.clamp(0, num_entities - 1)
        own_M = scores_ME.gather(1, column_M[:, None])[:, 0]
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
        """times_M: in how many workers' slices each gold is."""
        for mention in (times_M == 0).nonzero()[:, 0].tolist():
            row = int(self.gold_column_M[start + mention]) + self.index.first_row
            raise ValueError(f"mention {start + mention}: its gold, kb row {row}, is in no worker's index")

    def _score_all(self, start: int) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """Scores [M, E], choices [M, E] or None, and columns of counts (`_counted`) of one tile of mentions."""
        mentions = self.mentions.take(slice(start, start + self.size.mentions)).to(self.device)
        totals, choices, counts, first = [], [], [], 0
        for entities in self.index.tiles(self.size.entities):
            for scores in self._score_fitting(mentions, entities):
                _refuse_broken(scores, start, self.index.first_row + first)
                first += scores.total_ME.shape[1]
                totals.append(scores.total_ME)
                if scores.chosen_ME is not None:
                    choices.append(scores.chosen_ME.to(torch.int8))
                counts.append(_counted(scores))
        counted = {name: torch.stack([each[name] for each in counts]).sum(dim=0) for name in counts[0]}
        return torch.cat(totals, dim=1), torch.cat(choices, dim=1) if choices else None, counted

    def _score_fitting(self, mentions: Table, entities: Table) -> Iterator[Scores]:
        """Scores of a tile of entities, in parts of it where the device has no memory for all of it.

        Where half precision cannot hold token rows, this tile and all that follow are scored in single precision.
        """
        start = 0
        while start < len(entities):
            part = entities.rows(slice(start, start + self.size.entities))
            try:
                scores = self.matcher.score(mentions, part.to(self.device))
            except torch.OutOfMemoryError:
                if len(part) == 1:
                    raise
                self.size = TileSize(self.size.mentions, (len(part) + 1) // 2)
                self.notice(f"{self.device} is out of memory: going on with tiles of {self.size.entities} entities")
                continue
            except HalfOverflow as overflow:
                use_precision(self.matcher, "fp32", "triton")
                self.notice(f"{overflow}: going on with fp32")
                continue
            yield scores
            start += len(part)


def _counted(scores: Scores) -> dict[str, Tensor]:
    """Columns of a tile's scores that add up over tiles."""
    counted = {}
    if scores.tied_choice_ME is not None:
        counted["tied_choices"] = scores.tied_choice_ME.sum(dim=1)
    if scores.token_pairs_M2 is not None:
        counted["token_pairs"] = scores.token_pairs_M2
    return counted


def check_golds(gold_score_M: Tensor, gold_row_M: Tensor, rows: range) -> None:
    """Raises NotRankable when a gold in kb `rows`, the index's, scores NaN, ValueError when another has no score."""
    for mention in gold_score_M.isnan().nonzero()[:, 0].tolist():
        row = int(gold_row_M[mention])
        if row in rows:
            raise NotRankable(mention, row)
        raise ValueError(f"mention {mention}: its gold, kb row {row}, is not in the index, and its score is not given")


def _refuse_broken(scores: Scores, first_mention: int, first_row: int) -> None:
    """Raises NotRankable for a score that is NaN or infinite."""
    broken_ME = ~scores.total_ME.isfinite()
    if bool(broken_ME.any()):
        mention, entity = broken_ME.nonzero()[0].tolist()
        raise NotRankable(first_mention + mention, first_row + entity, scores.broken_part(mention, entity))


def _ranking(columns: Mapping[str, Tensor], first_row: int, close: Refinement | float) -> Ranking:
    """close: what refining took, or the band within which close pairs were counted."""
    return Ranking(
        ops.Counts(columns["better"], columns["tied"]),
        columns["top_row"] + first_row,
        columns["top_score"],
        columns.get("chosen_gold"),
        columns.get("chosen_top"),
        columns.get("chosen_pairs"),
        columns.get("tied_choices"),
        columns.get("token_pairs"),
        close if isinstance(close, Refinement) else None,
        Unrefined(close, columns["close"]) if isinstance(close, float) else None,
    )
