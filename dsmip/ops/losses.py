"""In-batch losses: contrastive (DSMIP eqs 17, 18), M3EL's within modalities, triplets. M mentions, E entity columns."""

import torch
from torch import Tensor
from torch.nn import functional as F

from dsmip.ops.gumbel import sample_gumbel


def contrastive_losses(scores_ME: Tensor, gold_column_M: Tensor, excluded_ME: Tensor | None = None) -> Tensor:
    """-log softmax(scores)[gold] of each mention, float [M].

    Args:
        scores_ME: float [M, E].
        gold_column_M: int64 [M].
        excluded_ME: bool [M, E], True takes a pair out of the denominator (the same gold in another column); the gold
            column itself is never taken out.

    >>> bool((contrastive_losses(torch.zeros(1, 4), torch.tensor([2])) == torch.tensor(4.0).log()).all())
    True
    """
    if excluded_ME is not None:
        excluded_ME = excluded_ME.scatter(1, gold_column_M[:, None], False)
        scores_ME = scores_ME.masked_fill(excluded_ME, -torch.inf)
    return F.cross_entropy(scores_ME, gold_column_M, reduction="none")


def contrastive_loss(scores_ME: Tensor, gold_column_M: Tensor, excluded_ME: Tensor | None = None) -> Tensor:
    """Sum over mentions of `contrastive_losses`, a scalar (DSMIP eq. 17)."""
    return contrastive_losses(scores_ME, gold_column_M, excluded_ME).sum()


def listwise_divergences(scores_ME: Tensor, teacher_ME: Tensor) -> Tensor:
    """KL divergence of softmax(scores) from softmax(teacher) over each mention's entities, float [M].

    It is 0 where the scores differ from the teacher's by a constant of the mention (ListNet's top-1 distribution, Cao
    et al., ICML 2007).

    Args:
        scores_ME, teacher_ME: float [M, E].

    >>> teacher = torch.tensor([[1.0, 2.0, 4.0]])
    >>> bool(listwise_divergences(teacher + 5, teacher).abs() < 1e-6)
    True
    """
    log_p_ME, log_teacher_ME = scores_ME.log_softmax(dim=1), teacher_ME.log_softmax(dim=1)
    return F.kl_div(log_p_ME, log_teacher_ME, reduction="none", log_target=True).sum(dim=1)


def joint_contrast_losses(
    mentions_Md: Tensor,
    entities_Ed: Tensor,
    gold_column_M: Tensor,
    same_ME: Tensor,
    *,
    temperature: float,
    intra_weight: float,
) -> Tensor:
    """Contrast of each mention with its entity, within sides too (M3EL's intra-modal loss), float [M].

    Of vectors of length one: -log softmax over [mention against all entities | intra_weight * mention against all
    mentions], and the same from its entity's side; the mean of both. A vector against itself counts as 0, not as
    nothing: so it is published. What has the same gold is no negative.

    Args:
        mentions_Md, entities_Ed: float, of any length.
        same_ME: bool [M, E], True where the entity is the mention's gold in another column.
        temperature: Cosines are divided by it.

    >>> pair = torch.tensor([[3.0, 0.0]])
    >>> settings = {"temperature": 1.0, "intra_weight": 0.8}
    >>> loss = joint_contrast_losses(pair, pair, torch.tensor([0]), torch.tensor([[False]]), **settings)
    >>> bool(torch.isclose(loss[0], torch.tensor(1 + 2.718281828**-1).log()))
    True
    """
    mentions_Md, entities_Ed = F.normalize(mentions_Md, dim=-1), F.normalize(entities_Ed, dim=-1)
    (num_mentions, num_entities), device = same_ME.shape, gold_column_M.device
    golds_Md, row_M = entities_Ed[gold_column_M], torch.arange(num_mentions, device=device)
    same_MM = same_ME[:, gold_column_M] | (gold_column_M[:, None] == gold_column_M)  # [i, j]: i and j have one gold
    self_ME = gold_column_M[:, None] == torch.arange(num_entities, device=device)
    self_MM = torch.eye(num_mentions, dtype=torch.bool, device=device)

    def logits(own_Md: Tensor, other_Nd: Tensor, excluded_MN: Tensor, kept_MN: Tensor) -> Tensor:
        return (own_Md @ other_Nd.T / temperature).masked_fill(excluded_MN & ~kept_MN, -torch.inf)

    def inside(own_Md: Tensor, own_Nd: Tensor, excluded_MN: Tensor, self_MN: Tensor) -> Tensor:
        return intra_weight * logits(own_Md, own_Nd, excluded_MN, self_MN).masked_fill(self_MN, 0.0)

    across = logits(mentions_Md, entities_Ed, same_ME, self_ME), logits(golds_Md, mentions_Md, same_MM, self_MM)
    within = inside(mentions_Md, mentions_Md, same_MM, self_MM), inside(golds_Md, entities_Ed, same_ME, self_ME)
    forth_M, back_M = (
        F.cross_entropy(torch.cat(both, dim=1), target_M, reduction="none")
        for *both, target_M in zip(across, within, (gold_column_M, row_M), strict=True)
    )
    return (forth_M + back_M) / 2


def triplet_losses(
    scores_ME: Tensor, gold_column_M: Tensor, excluded_ME: Tensor | None = None, *, margin: float, hardest: bool
) -> Tensor:
    """max(0, margin + negative - gold) of each mention, float [M]: of its best scored negative, or their mean.

    Args:
        scores_ME: float [M, E], such as cosines.
        gold_column_M: int64 [M].
        excluded_ME: bool [M, E], True where a column is no negative (the same gold in another column).
        margin: by which a gold is to score better than a negative.
        hardest: the negative with the highest score alone counts.

    >>> scores = torch.tensor([[0.9, 0.8, 0.1]])
    >>> round(float(triplet_losses(scores, torch.tensor([0]), margin=0.5, hardest=True)), 4)
    0.4
    >>> round(float(triplet_losses(scores, torch.tensor([0]), margin=0.5, hardest=False)), 4)
    0.2
    """
    is_negative_ME = torch.ones_like(scores_ME, dtype=torch.bool) if excluded_ME is None else ~excluded_ME
    is_negative_ME = is_negative_ME.scatter(1, gold_column_M[:, None], False)
    hinge_ME = (margin + scores_ME - scores_ME.gather(1, gold_column_M[:, None])).clamp_min(0)
    hinge_ME = hinge_ME.masked_fill(~is_negative_ME, 0.0)
    if hardest:
        return hinge_ME.amax(dim=1)
    return hinge_ME.sum(dim=1) / is_negative_ME.sum(dim=1).clamp_min(1)


def drawn_negatives(score_ME: Tensor, is_gold_ME: Tensor, generator: torch.Generator) -> Tensor:
    """A wrong column of each row, drawn by softmax(scores) over those that are wrong: int64 [M], -1 where none is.

    Args:
        is_gold_ME: bool [M, E], True where a column is right.
        generator: Of the CPU: draws are the same on every device.

    >>> scores, is_gold = torch.zeros(2, 2), torch.tensor([[True, False], [True, True]])
    >>> drawn_negatives(scores, is_gold, torch.Generator().manual_seed(0))
    tensor([ 1, -1])
    """
    if not score_ME.numel():
        return is_gold_ME.new_full(score_ME.shape[:1], -1, dtype=torch.int64)
    noise_ME = sample_gumbel(score_ME.shape, generator, torch.device("cpu")).to(score_ME.device)
    column_M = (score_ME.float() + noise_ME).masked_fill(is_gold_ME, -torch.inf).argmax(dim=1)
    return column_M.masked_fill(is_gold_ME.all(dim=1), -1)
