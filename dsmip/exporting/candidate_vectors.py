"""The vectors by which a bundle finds candidates: its model's global ones, or some that exact scores have taught."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from dsmip.data.dataset import Dataset
from dsmip.data.records import Mention
from dsmip.data.sampler import draw
from dsmip.distillation.fit import FitOptions, Lesson, fit_projection
from dsmip.distillation.vectors import DistilledVectors, inputs_of
from dsmip.errors import UserError
from dsmip.evaluation.candidates import CandidateSearch, GlobalVectors
from dsmip.evaluation.experts.survey import scored_by_tile
from dsmip.evaluation.index import EntityIndex
from dsmip.exporting.agreement import CANDIDATES, CandidateRecall, Probes, informed_batches
from dsmip.linking.linker import Linker
from dsmip.progress import Progress, counting, no_progress

VectorChoice = Literal["auto", "distilled", "global"]
ENOUGH, AT = 0.99, 100
"""Global vectors are kept where so many exact best entities are among so many candidates."""
MOST_MENTIONS, MOST_ENTITIES = 2048, 8192
"""That are scored to learn from."""


@dataclass(frozen=True)
class ChosenVectors:
    """What candidates are found by.

    Attributes:
        distilled: None: global vectors.
        recalls: Of each kind of vectors that was measured.
    """

    distilled: DistilledVectors | None
    recalls: dict[str, Sequence[CandidateRecall]]


def choose_vectors(
    linker: Linker,
    dataset: Dataset,
    probes: Probes | None,
    choice: VectorChoice,
    seed: int,
    progress: Progress = no_progress,
    notice: Callable[[str], None] = lambda line: None,
) -> ChosenVectors:
    """The vectors of a choice; `auto` takes distilled ones where global ones hold too little and distilled ones more.

    Args:
        linker: Of the model, with global vectors.
        dataset: Its training mentions are learned from.
        probes: Validation mentions, which judge and teach nothing; None: there are none, and `auto` stays with global.
        choice: What is asked for.
        seed: Of all that is drawn.
        progress: Of the training mentions that are scored.
        notice: Takes a line about the choice.

    Raises:
        UserError: Distilled vectors are asked for, and there are no training mentions.
    """
    recalls: dict[str, Sequence[CandidateRecall]] = {}
    if probes is not None and len(linker) > min(CANDIDATES):
        recalls["global"] = probes.recalls(linker.search.candidates)
    held = _held(recalls.get("global", ()))
    if choice == "global" or (choice == "auto" and (held is None or held >= ENOUGH)):
        return ChosenVectors(None, recalls)
    if not dataset.num_mentions("train"):
        if choice == "auto":
            return ChosenVectors(None, recalls)
        raise UserError(f"{dataset.location}: distilled vectors are learned from training mentions, and it has none")
    distilled = distil(linker, dataset, seed, progress)
    if probes is not None:
        recalls["distilled"] = probes.recalls(CandidateSearch(distilled, linker.search.index))
    now = _held(recalls.get("distilled", ()))
    if held is not None and now is not None:
        notice(f"{AT} candidates hold {held:.1%} of the best entities by global vectors, {now:.1%} by distilled ones")
        if choice == "auto" and now <= held:
            return ChosenVectors(None, recalls)
    return ChosenVectors(distilled, recalls)


def distil(linker: Linker, dataset: Dataset, seed: int, progress: Progress = no_progress) -> DistilledVectors:
    """Vectors that imitate the exact scores of some training mentions against some entities."""
    generator = torch.Generator().manual_seed(draw(2**63, "lesson of candidate vectors", seed))
    mentions = _sampled_mentions(dataset, generator)
    count = counting(progress, "training mentions scored", len(mentions))
    index = linker.search.index
    position_E = _sampled_entities(len(index), torch.tensor([each.entity_row for each in mentions]), generator)
    taken = EntityIndex([index.take(position_E)])
    base = GlobalVectors(linker.search.matcher, linker.device)
    inputs, scores = [], []
    for informed in informed_batches(linker, mentions):
        kept = {
            name: scores_mE[:, position_E.to(scores_mE.device)] for name, scores_mE in informed.expert_scores.items()
        }
        model = replace(informed, index=taken, expert_scores=kept)
        scores += [scores_mE.float().cpu() for _, scores_mE in scored_by_tile(model, linker.device)]
        inputs.append(inputs_of(model.mentions, "mentions", base).cpu())
        count(len(model.mentions))
    entity_inputs_Ed = torch.cat([inputs_of(tile, "entities", base).cpu() for tile in taken.tiles(512)])
    lesson = Lesson(torch.cat(inputs), entity_inputs_Ed, torch.cat(scores))
    return DistilledVectors(fit_projection(lesson, seed, FitOptions()), base)


def _sampled_mentions(dataset: Dataset, generator: torch.Generator) -> list[Mention]:
    order = torch.randperm(dataset.num_mentions("train"), generator=generator)
    return list(dataset.mentions("train", order[:MOST_MENTIONS].sort().values.tolist()))


def _sampled_entities(num_entities: int, gold_row_M: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Rows ascending: golds of the mentions, as far as they have room, and others at random."""
    random_E = torch.randperm(num_entities, generator=generator)
    is_gold_E = torch.zeros(num_entities, dtype=torch.bool).index_fill(0, gold_row_M, True)
    golds_first_E = torch.cat([random_E[is_gold_E[random_E]], random_E[~is_gold_E[random_E]]])
    return golds_first_E[:MOST_ENTITIES].sort().values


def _held(recalls: Sequence[CandidateRecall]) -> float | None:
    """The share of exact best entities that `AT` candidates hold; None: so many are all entities, or none was asked."""
    return next((each.best for each in recalls if each.k == AT), None)
