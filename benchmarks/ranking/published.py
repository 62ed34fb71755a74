"""The published MIMIC evaluator's logic, as the yardstick: the same scores from the same weights, without any care.

For every batch of 20 mentions and every chunk of 6,000 entities all items are normed and projected again; the text
attention exists as [M, E, S, T] and its context as [M, E, S, d]; LayerNorms run per pair; the dual units hold
[M, E, d]; ranks come from two full sorts. Written from this description of the published code, not from the code.

"Three experts computed naively" is the same logic for each expert and all pairs, after which the gate chooses.

M mentions of a batch, E entities of a chunk, N items, T mention and S entity text tokens, P picture tokens, d unit
width. Dual units: A items on the query side, B on the value side.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from dsmip.data.table import Table
from dsmip.models.dsmip import GATE, DsmipMatcher
from dsmip.models.mimic import MimicMatcher
from dsmip.units.cross_unit import CrossUnit
from dsmip.units.expert import Expert
from dsmip.units.matcher import Matcher, Scores
from dsmip.units.text_unit import TextUnit
from dsmip.units.unit_scorer import UnitScorer
from dsmip.units.visual_unit import DualUnit, VisualUnit

MENTION_BATCH, ENTITY_CHUNK = 20, 6000


@dataclass(frozen=True)
class Ranked:
    """rank_M: int64 [M], ties in any order. scores: of all pairs, with the gate's choices if there is one."""

    rank_M: Tensor
    scores: Scores


@torch.no_grad()
def stored_features(matcher: Matcher, features: Table) -> Table:
    """What the published encoder keeps of N items: all token places, and pictures already at the unit width.

    features: as `prepare_entities` takes them, with equally many tokens for every item. The same columns, all dense.
    """
    if isinstance(matcher, MimicMatcher):
        return _stored(matcher.scorer, features)
    stored = features.under(GATE).prefixed(GATE)
    for name, scorer in _scorers(matcher).items():
        stored = stored.merged(_stored(scorer, features.under(name)).prefixed(name))
    return stored


@torch.no_grad()
def rank(
    matcher: Matcher,
    mentions: Table,
    entities: Table,
    gold_row_M: Tensor,
    device: torch.device,
    *,
    mention_batch: int = MENTION_BATCH,
    entity_chunk: int = ENTITY_CHUNK,
) -> Ranked:
    """Ranks each mention's gold (int64 [M]) among all entities, from the `stored_features` of both sides.

    The whole knowledge base moves to the device again for every batch of mentions.
    """
    ranks, scores = [], []
    for batch_rows in _slices(len(mentions), mention_batch):
        batch = mentions.rows(batch_rows).to(device)
        chunks = [
            score(matcher, batch, entities.rows(rows).to(device)) for rows in _slices(len(entities), entity_chunk)
        ]
        scores.append(_joined(chunks, dim=1))
        rank_ME = scores[-1].total_ME.argsort(dim=1, descending=True).argsort(dim=1) + 1
        ranks.append(rank_ME.gather(1, gold_row_M[batch_rows, None].to(device))[:, 0])
    return Ranked(torch.cat(ranks), _joined(scores, dim=0))


@torch.no_grad()
def score(matcher: Matcher, mentions: Table, entities: Table) -> Scores:
    """Scores of all pairs of a batch and a chunk: MIMIC's mean of three units, or the expert that the gate chose."""
    if isinstance(matcher, MimicMatcher):
        return Scores(_expert_score(matcher.scorer, mentions, entities))
    experts = [
        _expert_score(scorer, mentions.under(name), entities.under(name)) for name, scorer in _scorers(matcher).items()
    ]
    gate = cast(DsmipMatcher, matcher).gate
    log_pi_MEB = gate.log_pi(gate.prepare_mentions(mentions.under(GATE)), gate.prepare_entities(entities.under(GATE)))
    chosen_ME = log_pi_MEB.argmax(dim=-1)
    return Scores(torch.stack(experts, dim=-1).gather(-1, chosen_ME[..., None])[..., 0], chosen_ME)


def _scorers(matcher: Matcher) -> Mapping[str, UnitScorer]:
    experts = cast(DsmipMatcher, matcher).experts
    return {name: cast(UnitScorer, cast(Expert, expert).scorer) for name, expert in experts.items()}


def _stored(scorer: UnitScorer, features: Table) -> Table:
    columns = {}
    if "text" in scorer.units:
        columns["text_global"] = features.dense("text_global")
        columns["text_tokens"], _ = features.ragged("text_tokens").padded()
    if "image" in scorer.units:
        columns["image_global"] = scorer.picture_norm.image_cls_fc(features.dense("image_global"))
        tokens_NPv, _ = features.ragged("image_tokens").padded()
        columns["image_tokens"] = scorer.picture_norm.image_tokens_fc(tokens_NPv)
    return Table(columns)


def _expert_score(scorer: UnitScorer, mentions: Table, entities: Table) -> Tensor:
    """Mean of the expert's units, [M, E]."""
    units = []
    if "text" in scorer.units:
        unit = cast(TextUnit, scorer.units["text"])
        units.append(_text_unit(unit, *_normed_text(scorer, mentions), *_normed_text(scorer, entities)))
    if "image" in scorer.units:
        visual = cast(VisualUnit, scorer.units["image"])
        mention_image, entity_image = _normed_image(scorer, mentions), _normed_image(scorer, entities)
        ent2men_EM = _dual_unit(visual.dual_ent2men, *entity_image, *mention_image)
        men2ent_ME = _dual_unit(visual.dual_men2ent, *mention_image, *entity_image)
        units.append((ent2men_EM.T + men2ent_ME) / 2)
    if "cross" in scorer.units:
        cross = cast(CrossUnit, scorer.units["cross"])
        fused = [
            _fused(cross, _normed_text(scorer, side)[0], _normed_image(scorer, side)[1])
            for side in (mentions, entities)
        ]
        units.append(fused[0] @ fused[1].T)
    return torch.stack(units).mean(dim=0)


def _normed_text(scorer: UnitScorer, items: Table) -> tuple[Tensor, Tensor]:
    norm = scorer.text_norm
    return norm.text_cls_layernorm(items.dense("text_global")), norm.text_tokens_layernorm(items.dense("text_tokens"))


def _normed_image(scorer: UnitScorer, items: Table) -> tuple[Tensor, Tensor]:
    norm = scorer.picture_norm
    tokens_NPd = norm.image_tokens_layernorm(items.dense("image_tokens"))
    return norm.image_cls_layernorm(items.dense("image_global")), tokens_NPd


def _text_unit(unit: TextUnit, global_Mz: Tensor, tokens_MTw: Tensor, global_Ez: Tensor, tokens_ESw: Tensor) -> Tensor:
    """U_T [M, E]. A broadcast matmul copies both sides for every pair before it multiplies."""
    query_ESd, key_MTd, value_MTd = unit.fc_query(tokens_ESw), unit.fc_key(tokens_MTw), unit.fc_value(tokens_MTw)
    logits_MEST = torch.matmul(query_ESd[None], key_MTd[:, None].transpose(-1, -2)) / math.sqrt(query_ESd.shape[-1])
    attention_MEST = torch.softmax(logits_MEST, dim=-1)
    context_MESd = torch.matmul(attention_MEST, value_MTd[:, None])
    context_MEd = unit.layer_norm(context_MESd.mean(dim=2))
    local_ME = (unit.fc_cls(global_Ez)[None] * context_MEd).sum(dim=-1)
    scores_ME: Tensor = (global_Mz @ global_Ez.T + local_ME) / 2
    return scores_ME


def _dual_unit(unit: DualUnit, query_Ad: Tensor, _: Tensor, global_Bd: Tensor, tokens_BPd: Tensor) -> Tensor:
    """One direction of U_V [A, B]; of the query side only the pooled picture counts."""
    query_Ad, key_Bd = unit.cls_fc(query_Ad), unit.cls_fc(global_Bd)
    value_Bd = unit.tokens_fc(tokens_BPd).mean(dim=1)
    hidden_ABd = unit.fc(unit.add_layer_norm(query_Ad[:, None] + value_Bd[None]))
    gated_ABd = torch.tanh(unit.gate_fc(hidden_ABd)) * hidden_ABd + key_Bd[None]
    scores_AB: Tensor = (unit.layer_norm(gated_ABd) * unit.layer_norm(query_Ad)[:, None]).sum(dim=-1)
    return scores_AB


def _fused(unit: CrossUnit, global_Nz: Tensor, tokens_NPd: Tensor) -> Tensor:
    """One side of U_C [N, d]."""
    text_Nd, tokens_NPd = unit.text_fc(global_Nz), unit.image_fc(tokens_NPd)
    attention_NP = torch.softmax((tokens_NPd @ text_Nd[:, :, None])[..., 0], dim=-1)
    context_Nd = (attention_NP[:, None] @ tokens_NPd)[:, 0]
    fused_Nd: Tensor = unit.gate_layer_norm(torch.tanh(unit.gate_fc(text_Nd)) * text_Nd + context_Nd)
    return fused_Nd


def _slices(count: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, count, size))


def _joined(parts: Sequence[Scores], dim: int) -> Scores:
    choices = [part.chosen_ME for part in parts if part.chosen_ME is not None]
    totals_ME = torch.cat([part.total_ME for part in parts], dim=dim)
    return Scores(totals_ME, torch.cat(choices, dim=dim) if choices else None)
