"""Findings of a finished first stage for its re-ranker's training: looked for once, and kept in the run by a key."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dsmip import distributed
from dsmip.data.collate import gold_rows
from dsmip.encoders.feature_keys import feature_key
from dsmip.evaluation.ranks import Ranking
from dsmip.ops.ranking import Counts
from dsmip.runs.run import Run
from dsmip.runs.weights import save_weights
from dsmip.training.loop import Context
from dsmip.training.validation.hard_negatives import alike_groups
from dsmip.training.validation.validation import EncodingValidation
from dsmip.units.matcher import Matcher


@dataclass(frozen=True, slots=True)
class FirstStage:
    """What a first stage says of the mentions that its re-ranker is trained with.

    Attributes:
        ranking: Of the validation mentions, with as many of their best entities as are re-ranked.
        hard_row_NK: Of the training mentions, kb rows of the best entities that are wrong.
    """

    ranking: Ranking
    hard_row_NK: Tensor

    def save(self, path: Path) -> None:
        """As one file of tensors."""
        ranking = self.ranking
        tensors = {"better": ranking.counts.better_M, "tied": ranking.counts.tied_M}
        tensors |= {"rows": ranking.top_row_Mk, "scores": ranking.top_score_Mk, "hard": self.hard_row_NK}
        save_weights(path, tensors)

    @staticmethod
    def load(path: Path) -> "FirstStage | None":
        """What `save` wrote; None where it cannot be read."""
        try:
            stored = load_file(path)
            counts = Counts(stored["better"], stored["tied"])
            return FirstStage(Ranking(counts, stored["rows"], stored["scores"]), stored["hard"])
        except (SafetensorError, OSError, KeyError):
            return None


def find_first_stage(
    run: Run, part: str, first: Matcher, num_candidates: int, num_negatives: int, context: Context
) -> FirstStage:
    """What the finished part says, from the run where it is kept; else all workers look for it, and it is kept.

    Args:
        part, first: The first stage, with its towers on the context's device.
        num_candidates: Of a validation mention.
        num_negatives: Of a training mention.
    """
    storage, collator = run.cache.storage, run.collator(part)
    weights = {**first.state_dict(), **first.encoder_state()}
    wanted = f"candidates {num_candidates} {num_negatives}"
    key = feature_key(weights, run.dataset.manifest_hash, collator.item_format, wanted, torch.float32)
    path = storage.folder / f"{part}-candidates-{key[:16]}.safetensors"
    kept = FirstStage.load(path) if run.cache.has(path) else None
    lacking = distributed.any_worker(kept is None, context.device)
    if kept is not None and not lacking:
        return kept
    validation = EncodingValidation(run.dataset, collator, context)
    validation.keeps_index = True
    ranking = validation.ranking(first, num_candidates)
    golds = gold_rows(run.dataset, "train")
    found = FirstStage(ranking, validation.hard_negatives(first, golds, alike_groups(run.dataset), num_negatives))
    if distributed.rank() == 0:
        with storage.atomic(path.name) as temporary:
            found.save(temporary)
    return found
