"""A model with its index and mentions, ready to rank, in memory and on disk.

<run>/index/<model>-<hash>/                     the entity index (see `dsmip.evaluation.index`)
<run>/index/<model>-<hash>/<split>.safetensors  prepared mentions, so that all workers score the very same numbers
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from dsmip.config import ExperimentConfig, RankOptions
from dsmip.data.collate import gold_rows
from dsmip.data.table import Table
from dsmip.errors import UserError
from dsmip.evaluation.candidates import CandidateSearch, Links, link
from dsmip.evaluation.index import EntityIndex
from dsmip.evaluation.ranking import Ranking, rank
from dsmip.evaluation.refinement import PairScorer
from dsmip.models import find_system
from dsmip.progress import Progress, no_progress
from dsmip.runs.run import Run
from dsmip.storage.locations import open_run_storage
from dsmip.storage.run_storage import RunStorage
from dsmip.units.matcher import Matcher
from dsmip.units.text_unit import use_backend, use_precision


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

    def link(
        self, k: int, device: torch.device, notice: Callable[[str], None] = print
    ) -> tuple[CandidateSearch, Links]:
        """A search for `k` candidates of every mention, and all of them in the order of their exact scores.

        Raises UserError for a model without global vectors.
        """
        if k > len(self.index):
            notice(f"{k} candidates of {len(self.index)} entities: all entities are candidates")
        search = CandidateSearch.build(self.matcher, self.index, device)
        return search, link(self.matcher, self.mentions, self.index, search, k, top=k)


@dataclass(frozen=True)
class RankedFiles:
    """Where a `RankedModel` is stored, for processes on any node.

    run: its location. name: of the index's folder, below the run.
    """

    run: str
    split: str
    model: str
    name: str
    made_from: Mapping[str, Any]

    @property
    def storage(self) -> RunStorage:
        return open_run_storage(self.run) / self.name

    @property
    def index(self) -> Path:
        """The folder on this node."""
        return self.storage.folder

    @property
    def mentions(self) -> Path:
        return self.index / f"{self.split}.safetensors"

    def open(self) -> RankedModel:
        """Everything memory-mapped; the model on the CPU. Raises UserError when something is missing or damaged."""
        run = Run.open(self.run)
        run.storage.pull(self.name)
        matcher, _, choices = load_model(run, self.model)
        index = EntityIndex.open(self.index, dict(self.made_from))
        gold_row_M = gold_rows(run.dataset, self.split)
        try:
            mentions = Table.load(self.mentions)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{self.mentions} is missing or damaged ({error}); delete it and evaluate again") from error
        return RankedModel(matcher, mentions, index, gold_row_M, choices)


def model_names(config: ExperimentConfig) -> tuple[str, ...]:
    """What can be evaluated: the gated whole first, then every part."""
    system = find_system(config.model)
    return (*([system.name] if system.gated else []), *system.part_names(config.system))


def load_model(run: Run, model: str) -> tuple[Matcher, ExperimentConfig, tuple[str, ...]]:
    """A finished part, or the gated whole by the system's name, for cached features; its configuration and choices.

    Raises UserError for an unknown model, or one that is not trained yet.
    """
    if model == run.system.name and run.system.gated:
        config = run.whole_config()
        return run.load_whole(), config, run.system.choices(config.system)
    if model in run.part_names:
        return run.load_part(model, with_encoder=False), run.config, ()
    raise UserError(f"unknown model '{model}'; this run has {', '.join(model_names(run.config))}")
