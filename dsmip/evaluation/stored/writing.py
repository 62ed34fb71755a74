"""The files of an evaluation's best entities, mention by mention."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dsmip.evaluation.groups import REPORTED
from dsmip.evaluation.index_builder import OpenedEvaluation
from dsmip.evaluation.ranks import Ranking
from dsmip.evaluation.stored.layout import KB_HASH, PROTOCOL
from dsmip.evaluation.stored.protocol import EvaluationProtocol


def write_ranks(
    path: Path,
    ranking: Ranking,
    evaluation: OpenedEvaluation,
    groups: Sequence[Mapping[str, str]],
    protocol: EvaluationProtocol,
) -> None:
    """Writes ranks.parquet.

    Args:
        path: Of the file.
        ranking: Of the evaluation's mentions.
        evaluation: What was ranked.
        groups: Of each mention, as they are reported.
        protocol: How it was evaluated.
    """
    best = _best_columns(ranking, evaluation)
    columns: dict[str, Any] = {
        **{name: best.pop(name) for name in ("mention_id", "word", "sentence", "groups")},
        **{name: pa.array([each.get(name) for each in groups], pa.string()) for name in REPORTED},
        "gold": best.pop("gold"),
        "rank": ranking.rank_M.tolist(),
        "better": ranking.counts.better_M.tolist(),
        "tied": ranking.counts.tied_M.tolist(),
        **{name: best.pop(name) for name in ("top", "top_scores")},
    }
    if ranking.choices is not None:
        columns["gold_expert"] = [evaluation.model.choices[c] for c in ranking.choices.gold_M.tolist()]
    columns |= best
    about = {KB_HASH: protocol.entities_sha256.encode(), PROTOCOL: protocol.model_dump_json().encode()}
    pq.write_table(pa.table(columns).replace_schema_metadata(about), path)


def write_unknown(path: Path, ranking: Ranking, evaluation: OpenedEvaluation) -> None:
    """Writes unknown.parquet: the best entities of mentions that have no gold in the kb."""
    pq.write_table(pa.table(_best_columns(ranking, evaluation)), path)


def _best_columns(ranking: Ranking, evaluation: OpenedEvaluation) -> dict[str, Any]:
    """Mentions and their best entities, as columns; `gold` is what the release calls one that the kb does not have."""
    mentions, entity_ids, experts = evaluation.mentions, evaluation.entity_ids, evaluation.model.choices
    columns: dict[str, Any] = {
        "mention_id": [mention.mention_id for mention in mentions],
        "word": [mention.word for mention in mentions],
        "sentence": [mention.sentence for mention in mentions],
        "groups": pa.array([list(mention.groups.items()) for mention in mentions], pa.map_(pa.string(), pa.string())),
        "gold": [mention.entity_id for mention in mentions],
        "top": [[entity_ids[row] for row in rows] for rows in ranking.top_row_Mk.tolist()],
        "top_scores": ranking.top_score_Mk.tolist(),
    }
    if ranking.choices is not None:
        columns["top_experts"] = [[experts[c] for c in row] for row in ranking.choices.top_Mk.tolist()]
    return columns
