"""The roofline of a device for a ranking. Only the text units count: they cost the most.

A pair with T mention and S entity tokens of width d takes T x S exponentials and 2 d T (S + 1) operations of products.
"""

from dataclasses import dataclass

import torch

from dsmip.data.table import Ragged, Table
from dsmip.evaluation.ranks import Ranking
from dsmip.planning.probing.measure import measured

_EXPONENTIALS_PER_CLOCK = 16  # of a multiprocessor's special function units, since 2017
_MATRIX, _CPU_MATRIX, _ROUNDS = 8192, 1024, 10


@dataclass(frozen=True)
class Rates:
    """Per second: operations of matrix products, exponentials."""

    operations: float
    exponentials: float


def device_rates(device: torch.device) -> Rates:
    """Products: measured in half precision. Exponentials: from the clock and the number of multiprocessors."""
    properties = torch.cuda.get_device_properties(device)
    clock = properties.clock_rate * 1e3
    exponentials = properties.multi_processor_count * _EXPONENTIALS_PER_CLOCK * clock
    return Rates(matrix_rate(device, torch.float16), exponentials)


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a large dense product, measured; on a CPU a second of all threads' time."""
    side = _MATRIX if device.type == "cuda" else _CPU_MATRIX
    matrix = torch.randn(side, side, device=device, dtype=dtype)
    matrix @ matrix

    def products() -> None:
        for _ in range(_ROUNDS):
            matrix @ matrix

    _, cost = measured(products, device)
    return 2 * side**3 * _ROUNDS / cost.seconds(device)


def work(mentions: Table, entities: Table, ranking: Ranking) -> Rates:
    """What the text units of a ranking took in all, from mean lengths and the pairs that were computed."""
    keys, queries = _tokens(mentions, "key"), _tokens(entities, "query")
    pairs = len(keys) * len(mentions) * len(entities)
    if ranking.cost.token_pairs_M2 is not None:
        pairs = int(ranking.cost.token_pairs_M2[:, 0].sum())
    num_keys = sum(_mean_length(key) for key in keys) / len(keys)
    num_queries = sum(_mean_length(query) for query in queries) / len(queries)
    width = keys[0].values.shape[1]
    return Rates(pairs * 2 * width * num_keys * (num_queries + 1), pairs * num_keys * num_queries)


def _tokens(table: Table, kind: str) -> list[Ragged]:
    columns = [column for name, column in table.columns.items() if name.split(".")[-1] == kind]
    return [column for column in columns if isinstance(column, Ragged)]  # dense ones are of the dual units


def _mean_length(tokens: Ragged) -> float:
    return float(tokens.lengths.double().mean())
