"""The training of a re-ranker: each mention's gold against what the first stage takes it for.

The first stage is finished and stays as it is: its hard negatives are found once (`first_stage.py`).
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from dsmip import distributed
from dsmip.config import TrainConfig, merged
from dsmip.data.collate import gold_rows
from dsmip.data.table import Table
from dsmip.evaluation.ranks import Ranking
from dsmip.reranking.candidates import score_candidates
from dsmip.reranking.first_stage import find_first_stage
from dsmip.reranking.ranks import reranked
from dsmip.runs.run import Run
from dsmip.training.batches import Step, StreamSource
from dsmip.training.gradients import autocast
from dsmip.training.loop import BatchSums, Context, Scale
from dsmip.training.stages import train_part
from dsmip.training.trainer import PartObjective, TrainResult, train
from dsmip.units.matcher import Reranker


def train_any_part(run: Run, part: str, context: Context) -> TrainResult:
    """Stage one of a part, a re-ranker or any other (`train_part`). The finished part is written by rank 0."""
    if part in run.system.rerankers(run.config.system):
        return train_reranker(run, part, context)
    return train_part(run, part, context)


def train_reranker(run: Run, part: str, context: Context) -> TrainResult:
    """A re-ranker, after its first stage.

    Raises:
        UserError: The first stage is not trained yet, or this training diverges.
    """
    first_stage = run.system.rerankers(run.config.system)[part]
    num_candidates = run.system.num_candidates(run.config.system)
    negatives = {"hard_negatives": max(num_candidates - 1, 1), "extra_negatives": 0, "self_mentions": 0}
    config = merged(run.config.train_of(part), negatives)
    first = run.load_part(first_stage, with_encoder=True).to(context.device)
    found = find_first_stage(run, first_stage, first, num_candidates, config.hard_negatives, context)
    source = StreamSource(run.dataset, "train", run.collator(part), config, run.config.seed, run.config.held_out)
    source.hard_row_NK = found.hard_row_NK
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.config.seed)
        reranker = run.system.build_reranker(part, run.config).to(context.device)
    reranker.start_from(first)
    del first
    result = train(
        reranker,
        source,
        config,
        context,
        _validation(run, part, found.ranking, context),
        objective=RerankingObjective(reranker, config),
        seed=run.config.seed,
        checkpoint_steps=run.config.part(part).checkpoint_steps,
    )
    if distributed.rank() == 0:
        run.save_part(part, reranker, {"best": result.best, "history": result.history})
    return result


def _validation(run: Run, part: str, first: Ranking, context: Context) -> Callable[[Reranker], Mapping[str, float]]:
    """Full-KB metrics of the validation mentions once the first stage's best are re-ranked; workers share mentions."""
    golds, collator = gold_rows(run.dataset, "validation"), run.collator(part)
    rank, world = distributed.rank(), distributed.world_size()
    rows = range(len(golds) * rank // world, len(golds) * (rank + 1) // world)

    def validate(reranker: Reranker) -> Mapping[str, float]:
        own_mK = score_candidates(
            reranker,
            run.dataset,
            "validation",
            collator,
            first.top_row_Mk[rows.start : rows.stop],
            context.device,
            rows=rows,
            after_batch=lambda _: context.alive(),
        )
        score_MK = distributed.gather_rows(own_mK.to(context.device)).cpu()
        return reranked(first, first.top_row_Mk, score_MK, golds).metrics()

    return validate


class RerankingObjective(PartObjective):
    """A re-ranker's own loss over a batch, some mentions at a time."""

    def __init__(self, reranker: Reranker, config: TrainConfig) -> None:
        self.module: Reranker = reranker
        self._config = config

    def backward(self, batch: Step, device: torch.device, scale: Scale) -> BatchSums:
        assert not isinstance(batch.mentions, Table)
        assert not isinstance(batch.entities, Table)
        entity_MK = candidates_of(batch)
        count = torch.tensor(float(len(entity_MK)), dtype=torch.float64, device=device)
        total = distributed.sum_over_workers(count).clamp_min(1)
        mentions, entities = batch.mentions.to(device), batch.entities.to(device)
        loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        size = self._config.micro_batch_size or max(len(entity_MK), 1)
        for start in range(0, len(entity_MK), size):
            few = mentions.rows(start, start + size)
            with autocast(self._config, device):
                loss = self.module(few, entities, entity_MK[start : start + size].to(device))
            scale(loss / total.to(loss.dtype)).backward()
            loss_sum += loss.detach()
        return BatchSums({"loss": float(distributed.sum_over_workers(loss_sum))}, int(total))


def candidates_of(step: Step) -> Tensor:
    """Columns int64 [M, K] of each mention's own entities in a step: its gold, then its hard negatives; -1 fills up."""
    assert step.hard_of_H is not None
    num_mentions, num_columns = len(step.gold_row_M), len(step.entity_row_E)
    count_M = torch.bincount(step.hard_of_H, minlength=num_mentions)
    column_MK = torch.full((num_mentions, 1 + int(count_M.max()) if num_mentions else 1), -1)
    column_MK[:, 0] = torch.arange(num_mentions)
    place_H = torch.arange(len(step.hard_of_H)) - (count_M.cumsum(0) - count_M)[step.hard_of_H]
    first = num_columns - len(step.hard_of_H)
    column_MK[step.hard_of_H, 1 + place_H] = torch.arange(first, num_columns)
    return column_MK
