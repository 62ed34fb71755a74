"""Tiles of scores: mentions against an index, one tile of both at a time, within the device's memory.

The gold's score is read from the same scoring call as its column's, never from a second one: scores of two calls differ
in the last bits. Scores of one tile of mentions against the whole slice are held; of all pairs only those of experts
that are fused, where they were kept. Shapes: M mentions, E entities of this worker's slice, k kept candidates.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dsmip.data.table import Table
from dsmip.distributed import sum_over_workers
from dsmip.evaluation.index import EntityIndex
from dsmip.evaluation.ranks import NotRankable
from dsmip.evaluation.refinement import Refiner
from dsmip.ops import ranking as ops
from dsmip.units.matcher import Matcher, Scores
from dsmip.units.text_unit import HalfOverflow, use_precision


@dataclass(frozen=True, slots=True)
class TileSize:
    """How many mentions and entities are scored at a time."""

    mentions: int
    entities: int


CPU_TILES, GPU_TILES = TileSize(128, 2048), TileSize(512, 8192)


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
        return index.to(device)
    except torch.OutOfMemoryError:
        notice(f"{device} has no memory for the whole index ({index.num_bytes / 2**30:.1f} GiB): slower, tile by tile")
        return index


@dataclass
class Tiles:
    """Mentions against an index, one tile of both at a time.

    Attributes:
        gold_column_M: Positions in the index; a gold that is not in it has a position outside.
        expert_scores: See `RankedModel`; they are fused, and no expert scores a pair again.
    """

    matcher: Matcher
    mentions: Table
    index: EntityIndex
    gold_column_M: Tensor
    device: torch.device
    size: TileSize
    notice: Callable[[str], None]
    after_tile: Callable[[int], None]
    expert_scores: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Checks what is fused.

        Raises:
            ValueError: Scores of experts are of other mentions or entities.
        """
        shape = (len(self.mentions), len(self.index))
        for name, scores_ME in self.expert_scores.items():
            if scores_ME.shape != shape:
                raise ValueError(f"{name}: scores {tuple(scores_ME.shape)} are not of these pairs, {shape}")

    def score(self, row_m: Tensor, column_e: Tensor) -> Tensor:
        """[m, e] of a few mentions and positions in the index, as `rank` scores them."""
        mentions = self.mentions.take(row_m).to(self.device)
        if self.expert_scores:
            scored = self._fused(
                mentions, {name: each[row_m][:, column_e] for name, each in self.expert_scores.items()}
            )
        else:
            scored = self._score_fitting(mentions, self.index.take(column_e))
        return torch.cat([scores.total_ME for scores in scored], dim=1)

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
        for scores in self._scored(start, mentions):
            _refuse_broken(scores, start, self.index.first_row + first)
            first += scores.total_ME.shape[1]
            totals.append(scores.total_ME)
            if scores.chosen_ME is not None:
                choices.append(scores.chosen_ME.to(torch.int8))
            counts.append(_counted(scores))
        names = counts[0] if counts else ()  # none of a worker's empty slice
        counted = {name: torch.stack([each[name] for each in counts]).sum(dim=0) for name in names}
        return torch.cat(totals, dim=1), torch.cat(choices, dim=1) if choices else None, counted

    def _scored(self, start: int, mentions: Table) -> Iterator[Scores]:
        """Of the mentions that begin at `start`, against the whole index."""
        if self.expert_scores:
            stop = start + len(mentions)
            yield from self._fused(mentions, {name: each[start:stop] for name, each in self.expert_scores.items()})
            return
        for entities in self.index.tiles(self.size.entities):
            yield from self._score_fitting(mentions, entities)

    def _fused(self, mentions: Table, scores: Mapping[str, Tensor]) -> Iterator[Scores]:
        def score(tile: slice) -> Scores:
            return self.matcher.fused(mentions, {name: scores_mE[:, tile] for name, scores_mE in scores.items()})

        num_entities = next(iter(scores.values())).shape[1]
        return self._fitting(score, num_entities)

    def _score_fitting(self, mentions: Table, entities: Table) -> Iterator[Scores]:
        def score(tile: slice) -> Scores:
            return self.matcher.score(mentions, entities.rows(tile).to(self.device))

        return self._fitting(score, len(entities))

    def _fitting(self, score: Callable[[slice], Scores], num_entities: int) -> Iterator[Scores]:
        """Scores of so many entities, in smaller tiles where the device has no memory for all of it.

        Where half precision cannot hold token rows, this tile and all that follow are scored in single precision.
        """
        start = 0
        while start < num_entities:
            tile = slice(start, min(start + self.size.entities, num_entities))
            length = tile.stop - tile.start
            try:
                scores = score(tile)
            except torch.OutOfMemoryError:
                if length == 1:
                    raise
                self.size = TileSize(self.size.mentions, (length + 1) // 2)
                self.notice(f"{self.device} is out of memory: going on with tiles of {self.size.entities} entities")
                continue
            except HalfOverflow as overflow:
                use_precision(self.matcher, "fp32", "triton")
                self.notice(f"{overflow}: going on with fp32")
                continue
            yield scores
            start += length


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
