"""One case, measured: the published logic and every backend by turns in one process, on the same items and weights.

The published logic runs one batch of mentions on fewer entities than ours, so that a run stays short: costs per pair
are compared. M mentions, E entities.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
from torch import Tensor

from benchmarks import roofline
from benchmarks.ranking import published
from benchmarks.ranking.cases import Case, Side, build_matcher, feature_blocks
from dsmip.data.table import Table, concatenate
from dsmip.evaluation import ranking as exact_ranking
from dsmip.evaluation.experts.survey import surveyed
from dsmip.evaluation.index import EntityIndex
from dsmip.evaluation.ranking import RankedModel
from dsmip.evaluation.ranks import Ranking
from dsmip.planning.probing.measure import Cost, measured
from dsmip.rank_options import PrecisionName, RankOptions
from dsmip.units.matcher import Matcher, Scores
from dsmip.units.text_unit import Backend, Precision, use_backend, use_precision

TOLERANCE: Mapping[Precision, float] = {"fp32": 5e-4, "fp16": 5e-2}
"""Largest difference allowed between scores that should be equal (the other side is float32; they spread by tens)."""
MAX_OTHER_CHOICES = 1e-3
"""Largest share of pairs that may go to another expert: two were equally good but for rounding."""


@dataclass(frozen=True)
class Sizes:
    """mentions, entities: what ours ranks. published_entities: what the published logic ranks (`entities` at most)."""

    mentions: int
    entities: int
    published_entities: int
    rounds: int


@dataclass(frozen=True)
class Measured:
    """The same work in several rounds."""

    num_pairs: int
    costs: Sequence[Cost]

    def us_per_pair(self, device: torch.device) -> list[float]:
        """Microseconds a pair, of what `Cost.seconds` says, by round."""
        return [1e6 * cost.seconds(device) / self.num_pairs for cost in self.costs]

    @property
    def pairs_per_s(self) -> float:
        """By the clock, the middle of all rounds."""
        return self.num_pairs / median(cost.wall_s for cost in self.costs)

    @property
    def peak_mib(self) -> float | None:
        """The most of all rounds."""
        peaks = [cost.peak_bytes for cost in self.costs if cost.peak_bytes is not None]
        return max(peaks) / 2**20 if peaks else None


@dataclass(frozen=True)
class Ours:
    """A backend's costs and ranks.

    ratios: the published logic's cost of a pair over ours, by round. other_ranks: mentions whose rank is not that of
    the float64 twin. difference: largest one to the published scores; None where those are of another function. work:
    what the text units took.
    """

    precision: Precision
    measured: Measured
    ratios: Sequence[float]
    ranking: Ranking
    other_ranks: int
    difference: float | None
    work: roofline.Rates


@dataclass(frozen=True)
class Outcome:
    """index_s: time on the clock to prepare all entities. index_bytes, published_bytes: kept of an entity."""

    case: Case
    published: Measured
    ours: Mapping[str, Ours]
    index_s: float
    index_bytes: float
    published_bytes: float


@dataclass(frozen=True)
class Ready:
    """What a ranking of ours takes, on the device."""

    matcher: Matcher
    mentions: Table
    entities: Table
    gold_row_M: Tensor


@dataclass(frozen=True)
class _Items:
    """One side. prepared: for our ranking, in `seconds`. stored: the first ones as the published logic keeps them."""

    prepared: Table
    stored: Table
    seconds: float


def run_case(
    case: Case, sizes: Sizes, backends: Sequence[Backend], precision: PrecisionName, device: torch.device
) -> Outcome:
    """Measures one case.

    Raises:
        RuntimeError: Scores differ that should be equal.
    """
    matcher = build_matcher(case, device)
    mentions = _prepare(matcher, case, "mentions", sizes.mentions, published.MENTION_BATCH, device)
    entities = _prepare(matcher, case, "entities", sizes.entities, sizes.published_entities, device)
    m, e, stored_m, stored_e = mentions.prepared, entities.prepared, mentions.stored, entities.stored
    gold_row_M = torch.randint(len(stored_e), (len(m),), generator=torch.Generator().manual_seed(0))

    matchers, precisions = {}, {}
    for backend in backends:
        matchers[backend] = copy.deepcopy(matcher)
        use_backend(matchers[backend], backend, device)
        precisions[backend] = use_precision(matchers[backend], precision, backend)
    few, first = slice(0, 4), torch.zeros_like(gold_row_M[:4])
    published.rank(matcher, stored_m.rows(few), stored_e.rows(few), first, device)  # first calls cost more
    for own in matchers.values():
        rank_ours(own, case, m.rows(few), e.rows(few), first, device)

    ranked, published_costs, rankings, costs = _by_turns(
        partial(published.rank, matcher, stored_m, stored_e, gold_row_M[: len(stored_m)], device),
        {name: partial(rank_ours, own, case, m, e, gold_row_M, device) for name, own in matchers.items()},
        sizes.rounds,
        device,
    )
    theirs = Measured(len(stored_m) * len(stored_e), published_costs)
    twin = copy.deepcopy(matcher).double()
    doubled = (m.cast(torch.float64), EntityIndex([e.cast(torch.float64)]))
    exact = exact_ranking.rank_unrefined(RankedModel(twin, *doubled, gold_row_M), device)
    ours: dict[str, Ours] = {}
    for name, own in matchers.items():
        mine = Measured(len(m) * len(e), costs[name])
        pairs = zip(theirs.us_per_pair(device), mine.us_per_pair(device), strict=True)
        other_ranks = int((rankings[name].rank_M != exact.rank_M).sum())
        difference = None
        if not case.masked:
            with torch.no_grad():
                scores = own.score(m.rows(slice(0, len(stored_m))), e.rows(slice(0, len(stored_e))))
            difference = checked_difference(f"{case.name}, {name}", ranked.scores, scores, TOLERANCE[precisions[name]])
        ours[name] = Ours(
            precisions[name],
            mine,
            [their_us / my_us for their_us, my_us in pairs],
            rankings[name],
            other_ranks,
            difference,
            roofline.work(m, e, rankings[name]),
        )
    bytes_of = (e.num_bytes / len(e), stored_e.num_bytes / len(stored_e))
    return Outcome(case, theirs, ours, entities.seconds, *bytes_of)


def ready_to_rank(case: Case, num_mentions: int, num_entities: int, backend: Backend, device: torch.device) -> Ready:
    """A case without its published side, at any size."""
    matcher = build_matcher(case, device)
    mentions = _prepare(matcher, case, "mentions", num_mentions, 0, device)
    entities = _prepare(matcher, case, "entities", num_entities, 0, device)
    use_backend(matcher, backend, device)
    use_precision(matcher, "auto", backend)
    gold_row_M = torch.randint(num_entities, (num_mentions,), generator=torch.Generator().manual_seed(0))
    return Ready(matcher, mentions.prepared, entities.prepared, gold_row_M)


def _by_turns(
    rank_published: Callable[[], published.Ranked],
    rank_own: Mapping[str, Callable[[], Ranking]],
    rounds: int,
    device: torch.device,
) -> tuple[published.Ranked, list[Cost], dict[str, Ranking], dict[str, list[Cost]]]:
    """Results of the last round (they are the same in all) and the costs of every round."""
    published_costs: list[Cost] = []
    costs: dict[str, list[Cost]] = {name: [] for name in rank_own}
    rankings: dict[str, Ranking] = {}
    for _ in range(rounds):
        ranked, cost = measured(rank_published, device)
        published_costs.append(cost)
        for name, rank_it in rank_own.items():
            rankings[name], cost = measured(rank_it, device)
            costs[name].append(cost)
    return ranked, published_costs, rankings, costs


def rank_ours(
    matcher: Matcher, case: Case, mentions: Table, entities: Table, gold_row_M: Tensor, device: torch.device
) -> Ranking:
    """What `dsmip evaluate` runs on prepared tables: close pairs are scored again in float64."""
    model = RankedModel(matcher, mentions, EntityIndex([entities]), gold_row_M, case.choices)
    return exact_ranking.rank(surveyed(model, device), device, top_k=RankOptions().top_k)


def checked_difference(what: str, published_scores: Scores, our_scores: Scores, tolerance: float) -> float:
    """The largest difference between scores of the same pairs, those left out that went to another expert.

    Raises:
        RuntimeError: It exceeds the tolerance, or other experts' share MAX_OTHER_CHOICES.
    """
    same_ME = torch.ones_like(our_scores.total_ME, dtype=torch.bool)
    if published_scores.chosen_ME is not None and our_scores.chosen_ME is not None:
        same_ME = published_scores.chosen_ME == our_scores.chosen_ME
    if (share := float((~same_ME).double().mean())) > MAX_OTHER_CHOICES:
        raise RuntimeError(f"{what}: {share:.2%} of the pairs go to another expert than in the published logic")
    difference = float((published_scores.total_ME - our_scores.total_ME).abs()[same_ME].max())
    if not difference <= tolerance:
        raise RuntimeError(f"{what}: scores differ by {difference:.2g} from the published logic's")
    return difference


def _prepare(matcher: Matcher, case: Case, side: Side, count: int, num_stored: int, device: torch.device) -> _Items:
    """Features are drawn block by block, so that they never exist for all items."""
    prepare = matcher.prepare_mentions if side == "mentions" else matcher.prepare_entities
    prepared, stored, seconds, first = [], [], 0.0, 0
    for full, own in feature_blocks(case, side, count, device):
        with torch.no_grad():
            table, cost = measured(partial(prepare, own), device)
        prepared.append(table)
        seconds += cost.wall_s
        if first < num_stored:
            features = full.rows(slice(0, num_stored - first))
            stored.append(published.stored_features(matcher, features).to(torch.device("cpu")))
        first += len(full)
    return _Items(concatenate(prepared), concatenate(stored) if stored else Table({}), seconds)
