"""The fit of distilled vectors to exact scores of training mentions.

First the linear maps in closed form: the products of rank g that are nearest to the scores in the mean square
(reduced-rank ridge regression on both sides). Then all weights by gradient on the listwise divergence from the scores'
own distribution over entities (KL of softmax, as of ListNet, Cao et al., ICML 2007): of the order only the top counts.
Some of the training mentions are held out and judge which state is kept. M mentions, E sampled entities, d inputs,
g width of a vector.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from dsmip.data.sampler import draw
from dsmip.distillation.products import nearest_products
from dsmip.distillation.vectors import Projection
from dsmip.ops.losses import listwise_divergences

_NOISE = 1e-5  # of an input's largest value: columns that differ by less differ by rounding
_JUDGED = 8  # one mention of so many is held out
_BEST = 4  # entities of each mention that are in every step with it


@dataclass(frozen=True)
class FitOptions:
    """How vectors are fitted.

    Attributes:
        width: Of a vector.
        hidden: Of the bottlenecks.
        epochs: Over the mentions.
        batch_size: Mentions of a step.
        batch_entities: Entities that a step's distributions are over, drawn anew.
        learning_rate: Of AdamW at its first step; it falls to 0 (cosine).
        weight_decay: AdamW's.
        temperature: Scores of a mention have a standard deviation of 1 over this before they are a distribution.
    """

    width: int = 256
    hidden: int = 256
    epochs: int = 30
    batch_size: int = 128
    batch_entities: int = 1024
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    temperature: float = 0.3


@dataclass(frozen=True)
class Lesson:
    """What vectors are fitted to.

    Attributes:
        mention_inputs_Md, entity_inputs_Ed: float32 [M, d] and [E, d] (`inputs_of`).
        scores_ME: Exact ones, float32 [M, E].
    """

    mention_inputs_Md: Tensor
    entity_inputs_Ed: Tensor
    scores_ME: Tensor


def fit_projection(lesson: Lesson, seed: int, options: FitOptions = FitOptions()) -> Projection:
    """The networks whose products imitate the scores best; the same for the same seed on one machine."""
    target_ME = _standardised(lesson.scores_ME) / options.temperature
    held_out_M = torch.arange(len(target_ME)) % _JUDGED == _JUDGED - 1
    learned, judged = ((~held_out_M).nonzero()[:, 0], held_out_M.nonzero()[:, 0])
    if not len(judged):
        judged = learned
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(draw(2**31, "candidate vectors", seed))
        projection = _started(lesson, learned, target_ME, options)
        best, best_rank = copy.deepcopy(projection.state_dict()), _log_rank(projection, lesson, judged)
        for _ in _epochs(projection, lesson, learned, target_ME, options):
            log_rank = _log_rank(projection, lesson, judged)
            if log_rank < best_rank:
                best, best_rank = copy.deepcopy(projection.state_dict()), log_rank
    projection.load_state_dict(best)
    return projection.eval()


def _standardised(scores_ME: Tensor) -> Tensor:
    """Scores of mean 0 and variance 1 over each mention's entities."""
    deviation_M1 = scores_ME.std(dim=1, keepdim=True, correction=0).clamp_min(1e-6)
    return (scores_ME - scores_ME.mean(dim=1, keepdim=True)) / deviation_M1


@torch.no_grad()
def _started(lesson: Lesson, learned: Tensor, target_ME: Tensor, options: FitOptions) -> Projection:
    """Networks that standardise their inputs, whose linear maps are those of the nearest products."""
    of_mentions_md, of_entities_Ed = lesson.mention_inputs_Md[learned], lesson.entity_inputs_Ed
    projection = Projection(of_mentions_md.shape[1], of_entities_Ed.shape[1], options.hidden, options.width)
    for network, inputs_Nd in ((projection.mentions, of_mentions_md), (projection.entities, of_entities_Ed)):
        deviation_d = inputs_Nd.double().std(dim=0, correction=0)
        network.mean_d.copy_(inputs_Nd.double().mean(dim=0))
        differs_d = deviation_d > _NOISE * inputs_Nd.double().abs().amax(dim=0).clamp_min(1e-30)
        network.scale_d.copy_(torch.where(differs_d, 1 / deviation_d, 0.0))
    with_bias = F.pad(projection.mentions.standardised(of_mentions_md), (0, 1), value=1.0)
    entities = projection.entities.standardised(of_entities_Ed)
    mention_map, entity_map = nearest_products(with_bias, entities, target_ME[learned], options.width)
    projection.mentions.linear.weight.copy_(mention_map[:, :-1])
    projection.mentions.linear.bias.copy_(mention_map[:, -1])
    projection.entities.linear.weight.copy_(entity_map)
    projection.entities.linear.bias.zero_()
    for network in (projection.mentions, projection.entities):
        network.out.weight.zero_()
    return projection


def _epochs(
    projection: Projection, lesson: Lesson, learned: Tensor, target_ME: Tensor, options: FitOptions
) -> Iterator[None]:
    """Trains the projection in place; yields after each epoch."""
    num_steps = options.epochs * -(-len(learned) // options.batch_size)
    optimizer = torch.optim.AdamW(projection.parameters(), options.learning_rate, weight_decay=options.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    for _ in range(options.epochs):
        for batch in learned[torch.randperm(len(learned))].split(options.batch_size):
            entities = _entities_of_step(target_ME[batch], options.batch_entities)
            mentions_mg = projection.mentions(lesson.mention_inputs_Md[batch])
            entities_eg = projection.entities(lesson.entity_inputs_Ed[entities])
            divergence_m = listwise_divergences(mentions_mg @ entities_eg.T, target_ME[batch][:, entities])
            optimizer.zero_grad()
            divergence_m.mean().backward()
            optimizer.step()
            schedule.step()
        yield


def _entities_of_step(target_mE: Tensor, count: int) -> Tensor:
    """Columns of a step: the best of each mention, and others at random."""
    num_entities = target_mE.shape[1]
    if num_entities <= count:
        return torch.arange(num_entities)
    best = target_mE.topk(_BEST, dim=1).indices.unique()
    columns: Tensor = torch.cat([best, torch.randperm(num_entities)[: max(count - len(best), 0)]]).unique()
    return columns


@torch.no_grad()
def _log_rank(projection: Projection, lesson: Lesson, rows: Tensor) -> float:
    """Mean logarithm of the rank that the exact best entity of some mentions has by products; inf if it diverged."""
    mentions_mg = projection.mentions(lesson.mention_inputs_Md[rows])
    product_mE = mentions_mg @ projection.entities(lesson.entity_inputs_Ed).T
    if not bool(product_mE.isfinite().all()):
        return float("inf")
    best_m1 = lesson.scores_ME[rows].argmax(dim=1, keepdim=True)
    rank_m = 1 + (product_mE > product_mE.gather(1, best_m1)).sum(dim=1)
    return float(rank_m.double().log().mean())
