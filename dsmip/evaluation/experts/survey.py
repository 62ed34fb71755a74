"""The first pass of a ranking by fused experts: what every expert's scores over the whole kb say of each mention.

Slices of the kb are surveyed on their own and merged. Best and second-best scores are decided in float64, as in a
ranking, so that ties and near ties do not depend on tiles; sums over the kb are of single-precision scores, which err
by a millionth or so. All that a mention needs is put into its table once, so every pair of it is scored on one scale.
M mentions, B experts.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from dsmip.evaluation.index import EntityIndex
from dsmip.evaluation.ranking import RankedModel
from dsmip.evaluation.ranks import NotRankable, merge_gold_scores
from dsmip.evaluation.refinement import DoubleCopies, PairScorer, Refiner
from dsmip.evaluation.tiles import Tiles, TileSize, default_tiles, placed
from dsmip.ops.experts.statistics import ExpertStatistics, Survey, expert_statistics, merge_statistics
from dsmip.rank_options import RankOptions
from dsmip.units.matcher import Matcher

KEPT_BYTES = 2**28
"""Of scores that are kept between the passes of a ranking, of all experts."""
Statistics = Mapping[str, ExpertStatistics]
_PAIRS = 2**22  # of a tile of log probabilities
_TOGETHER = 16  # mentions whose experts' best entities are scored in one call


def needs_survey(model: RankedModel) -> bool:
    """Whether its mentions must be `informed` before they can be ranked."""
    return bool(model.matcher.surveyed())


def surveyed(
    model: RankedModel,
    device: torch.device,
    options: RankOptions = RankOptions(),
    notice: Callable[[str], None] = lambda line: None,
    *,
    tile_size: TileSize | None = None,
    kept: "KeptScores | None" = None,
) -> RankedModel:
    """The model with its mentions informed, from its whole index; the same model where nothing need be known.

    It has the experts' scores, where there is room for them: they are scored once for both passes.

    Args:
        kept: For other models that fuse the same experts, of the same mentions (default: scores of this model alone).

    Raises:
        NotRankable: A score is NaN or infinite.
    """
    if not needs_survey(model):
        return model
    kept = kept or KeptScores()
    model = model.ready(device, options, notice)
    return informed(model, survey(model, device, notice, tile_size=tile_size, kept=kept), kept)


def survey(
    model: RankedModel,
    device: torch.device,
    notice: Callable[[str], None] = lambda line: None,
    *,
    tile_size: TileSize | None = None,
    copies: DoubleCopies | None = None,
    kept: "KeptScores | None" = None,
) -> Survey:
    """The survey of its mentions, from its whole index.

    Args:
        copies: Of the experts in float64, for the next survey as well.
        kept: The experts' scores, for what else is asked of the same mentions.

    Raises:
        NotRankable: A score is NaN or infinite.
    """
    copies = copies or DoubleCopies()
    found = slice_statistics(model, model.index, device, notice, tile_size=tile_size, copies=copies, kept=kept)
    return survey_of(found, [cross_scores(model, model.index, best_rows(found), device, copies)])


@torch.no_grad()
def slice_statistics(
    model: RankedModel,
    index: EntityIndex,
    device: torch.device,
    notice: Callable[[str], None] = lambda line: None,
    *,
    tile_size: TileSize | None = None,
    copies: DoubleCopies | None = None,
    kept: "KeptScores | None" = None,
) -> Statistics:
    """Every expert's statistics of all mentions against a slice of the index, on the CPU.

    Raises:
        NotRankable: A score is NaN or infinite.
    """
    found, kept = {}, kept or KeptScores(most_bytes=0)
    model = replace(model, index=index)
    for name, (expert, scale) in model.matcher.surveyed().items():
        own = of_expert(model, name, expert)
        pairs = PairScorer(own.matcher, own.mentions, own.index, device, notice, copies)
        try:
            found[name] = _statistics(own, pairs, scale, partial(kept.tiles, model, name, device, tile_size, notice))
        except NotRankable as error:
            raise NotRankable(error.mention, error.entity_row, name) from None
    return found


def _statistics(
    expert: RankedModel, pairs: PairScorer, scale: float, scored: Callable[[], Iterator[tuple[int, Tensor]]]
) -> ExpertStatistics:
    unknown_M = torch.full((len(expert.mentions),), torch.nan, dtype=torch.float64)  # no gold is looked at
    refiner = Refiner(pairs, unknown_M)
    while True:
        tiles = []
        for start, scores_ME in scored():
            own_M = scores_ME.new_full((len(scores_ME),), torch.nan)
            exact_ME, _ = refiner.refine(scores_ME, start, own_M, 2)
            tiles.append(expert_statistics(exact_ME * scale, expert.index.first_row))
        if refiner.band_held:
            return ExpertStatistics(*(torch.cat(each).cpu() for each in zip(*tiles, strict=True)))
        refiner.widen()


@torch.no_grad()
def scored_by_tile(
    model: RankedModel,
    device: torch.device,
    *,
    tile_size: TileSize | None = None,
    notice: Callable[[str], None] = lambda line: None,
) -> Iterator[tuple[int, Tensor]]:
    """Every tile's first mention and its scores [m, E] against the whole index.

    Raises:
        NotRankable: A score is NaN or infinite.
    """
    matcher, mentions, size = model.matcher.eval(), model.mentions, tile_size or default_tiles(device, len(model.index))
    nowhere_M = torch.full((len(mentions),), -1)
    index = placed(model.index, device, notice)
    tiles = Tiles(matcher, mentions, index, nowhere_M, device, size, notice, lambda done: None, model.expert_scores)
    for start in range(0, len(mentions), size.mentions):
        yield start, tiles.score_all(start)[0]


class KeptScores:
    """Experts' scores of the same mentions against the same index, kept from the first pass on where there is room.

    Args:
        most_bytes: Of all experts together; where they take more none is kept.
    """

    def __init__(self, most_bytes: int = KEPT_BYTES) -> None:
        self._most_bytes = most_bytes
        self._scores: dict[str, Tensor] = {}

    def of(self, model: RankedModel) -> Mapping[str, Tensor]:
        """Scores [M, E] by name of all experts that a model fuses; none where not all are here."""
        names = model.matcher.surveyed()
        return {name: self._scores[name] for name in names} if names.keys() <= self._scores.keys() else {}

    def tiles(
        self,
        model: RankedModel,
        name: str,
        device: torch.device,
        tile_size: TileSize | None = None,
        notice: Callable[[str], None] = lambda line: None,
    ) -> Iterator[tuple[int, Tensor]]:
        """As `scored_by_tile` of the expert of that name.

        Raises:
            ValueError: What is kept is of other mentions or entities.
        """
        experts, shape = model.matcher.surveyed(), (len(model.mentions), len(model.index))
        if name in self._scores:
            if self._scores[name].shape != shape:
                raise ValueError(
                    f"{name}: kept scores {tuple(self._scores[name].shape)} are not of these pairs, {shape}"
                )
            num_mentions = (tile_size or default_tiles(device, shape[1])).mentions
            for start in range(0, shape[0], num_mentions):
                yield start, self._scores[name][start : start + num_mentions]
            return
        own, scores_ME = of_expert(model, name, experts[name][0]), None
        for start, tile_mE in scored_by_tile(own, device, tile_size=tile_size, notice=notice):
            if start == 0 and len(experts) * math.prod(shape) * tile_mE.element_size() <= self._most_bytes:
                scores_ME = tile_mE if len(tile_mE) == shape[0] else _room(tile_mE, shape)
            if scores_ME is not None and scores_ME is not tile_mE:
                scores_ME[start : start + len(tile_mE)] = tile_mE
            yield start, tile_mE
        if scores_ME is not None:
            self._scores[name] = scores_ME


def _room(tile_mE: Tensor, shape: tuple[int, int]) -> Tensor | None:
    """For scores like the tile's; None where the device has no memory for them."""
    try:
        return tile_mE.new_empty(shape)
    except torch.OutOfMemoryError:
        return None


@torch.no_grad()
def log_probabilities(
    model: RankedModel, device: torch.device, kept: KeptScores | None = None
) -> Iterator[tuple[int, Tensor]]:
    """A tile's first mention and all experts' log probabilities over the whole index, float64 [B, m, E].

    Tiles are small: what is made of them takes several times their room.

    Raises:
        NotRankable: A score is NaN or infinite.
    """
    experts, kept = model.matcher.surveyed(), kept or KeptScores(most_bytes=0)
    tiles_of = [kept.tiles(model, name, device) for name in experts]
    scale_B11 = torch.tensor([scale for _, scale in experts.values()], dtype=torch.float64, device=device)[
        :, None, None
    ]
    rows = max(_PAIRS // len(model.index), 1)
    for tiles in zip(*tiles_of, strict=True):
        for first in range(0, len(tiles[0][1]), rows):
            scores_BME = torch.stack([scores_ME[first : first + rows] for _, scores_ME in tiles]).double()
            yield tiles[0][0] + first, torch.log_softmax(scores_BME * scale_B11, dim=2)


def merged_statistics(slices: Sequence[Statistics]) -> Statistics:
    """Statistics of the whole kb from those of disjoint slices."""
    return {name: merge_statistics([each[name] for each in slices]) for name in slices[0]}


def best_rows(statistics: Statistics) -> Tensor:
    """kb rows int64 [M, B]: each expert's best entity."""
    return torch.stack([each.row_M for each in statistics.values()], dim=1)


@torch.no_grad()
def cross_scores(
    model: RankedModel, index: EntityIndex, row_MB: Tensor, device: torch.device, copies: DoubleCopies | None = None
) -> Tensor:
    """float64 [M, B, B]: exact scores times scale, by the first expert, of kb rows; NaN where not in this slice."""
    column_MB = row_MB - index.first_row
    here_MB = (column_MB >= 0) & (column_MB < len(index))
    scores_MBB = torch.full((len(row_MB), row_MB.shape[1], row_MB.shape[1]), torch.nan, dtype=torch.float64)
    model = replace(model, index=index)
    for b, (name, (expert, scale)) in enumerate(model.matcher.surveyed().items()):
        own = of_expert(model, name, expert)
        pairs = PairScorer(own.matcher, own.mentions, own.index, device, copies=copies)
        for row_m in here_MB.any(dim=1).nonzero()[:, 0].split(_TOGETHER):
            here_mB, column_mB = here_MB[row_m], column_MB[row_m]
            column_e = column_mB[here_mB].unique()
            score_me = pairs.score(row_m, column_e) * scale
            position_mB = torch.searchsorted(column_e, column_mB).clamp_max(len(column_e) - 1)
            scores_MBB[row_m, b] = score_me.gather(1, position_mB).where(here_mB, torch.nan)
    return scores_MBB


def survey_of(statistics: Statistics, cross: Sequence[Tensor]) -> Survey:
    """The survey from the whole kb's statistics and the `cross_scores` of all slices."""
    scores_MBB = merge_gold_scores([each.flatten() for each in cross]).reshape(cross[0].shape)
    return Survey(statistics, scores_MBB)


@torch.no_grad()
def informed(model: RankedModel, survey: Survey, kept: KeptScores | None = None) -> RankedModel:
    """The model with its mentions informed of their survey, and with the experts' scores if they were kept."""
    mentions = model.matcher.eval().informed(model.mentions, survey)
    return replace(model, mentions=mentions, expert_scores=kept.of(model) if kept else {})


def of_expert(model: RankedModel, name: str, expert: Matcher) -> RankedModel:
    """One of the experts of a model, with its own columns of mentions and index."""
    return RankedModel(expert, model.mentions.under(name), model.index.under(name), model.gold_row_M)
