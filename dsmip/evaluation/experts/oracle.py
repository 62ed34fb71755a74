"""The oracle over experts: the ceiling of any gate that chooses one of them per mention."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from dsmip.errors import UserError
from dsmip.evaluation.groups import KIND
from dsmip.evaluation.metrics import summarise
from dsmip.evaluation.stored.layout import RANKS
from dsmip.ops import ranking as ops


def oracle(folders: Mapping[str, Path]) -> dict[str, Any]:
    """Metrics of the oracle that takes, for each mention, the expert that ranks its gold best.

    Args:
        folders: Evaluation folders by expert name, of the same split.

    Returns:
        Overall metrics, and hits@1 by kind.

    Raises:
        UserError: They are not of the same mentions.
    """
    tables = [pq.read_table(folder / RANKS) for folder in folders.values()]
    if len({tuple(table.column("mention_id").to_pylist()) for table in tables}) != 1:
        raise UserError("the experts were evaluated on different mentions; evaluate all of them on one split")
    counts_BM = ops.Counts(*(_stacked(tables, name) for name in ("better", "tied")))
    best_1M = ops.realistic_ranks(counts_BM).argmin(dim=0, keepdim=True)
    counts = ops.Counts(*(each_BM.gather(0, best_1M)[0] for each_BM in counts_BM))
    kinds = tables[0].column(KIND).to_pylist()
    by_kind = {}
    for kind in sorted({k for k in kinds if k is not None}):
        rows = torch.tensor([k == kind for k in kinds])
        by_kind[kind] = summarise(ops.Counts(counts.better_M[rows], counts.tied_M[rows]))["hits@1"]
    return {"overall": summarise(counts), "by_kind": by_kind}


def _stacked(tables: Sequence[pa.Table], column: str) -> Tensor:
    return torch.stack([torch.tensor(table.column(column).to_pylist()) for table in tables])
