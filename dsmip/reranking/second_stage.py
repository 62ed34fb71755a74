"""The second stage of an evaluation: a run's re-ranker over the best entities of its first stage."""

from dataclasses import dataclass, replace

import torch

from dsmip.evaluation.index_builder import OpenedEvaluation
from dsmip.evaluation.ranks import Ranking
from dsmip.progress import Progress, counting, no_progress
from dsmip.reranking.candidates import score_candidates
from dsmip.reranking.ranks import reranked


@dataclass(frozen=True)
class RunReranker:
    """A finished re-ranker of a run.

    Attributes:
        candidates: How many of the first stage's best entities it scores.
    """

    evaluation: OpenedEvaluation
    part: str
    candidates: int
    device: torch.device
    progress: Progress

    def __call__(self, first: Ranking) -> Ranking:
        """The ranking with its best entities scored once more."""
        run, split = self.evaluation.run, self.evaluation.split
        row_MK = first.top_row_Mk[:, : self.candidates]
        score_MK = score_candidates(
            run.load_reranker(self.part).to(self.device),
            run.dataset,
            split,
            run.collator(self.part),
            row_MK,
            self.device,
            after_batch=counting(self.progress, f"{split} re-ranked by {self.part}", len(row_MK)),
        )
        return reranked(first, row_MK, score_MK, self.evaluation.gold_row_M)

    def over(self, evaluation: OpenedEvaluation) -> "RunReranker":
        """The same of other mentions of the run."""
        return replace(self, evaluation=evaluation)


def second_stage(
    evaluation: OpenedEvaluation, device: torch.device, progress: Progress = no_progress
) -> RunReranker | None:
    """What re-ranks the evaluation's model; None where nothing does.

    Raises:
        UserError: The re-ranker is not trained yet.
    """
    part, run = evaluation.model.reranker, evaluation.run
    if part is None:
        return None
    run.part_report(part)
    return RunReranker(evaluation, part, run.system.num_candidates(run.config.system), device, progress)
