"""A part of the knowledge base that validations between full ones rank over.

Fewer wrong entities stand before a gold there, so its metrics are better than those over all: they have names of their
own, and choose no epoch.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from dsmip.data.sampler import draw
from dsmip.training.validation.validation import Validation
from dsmip.units.matcher import Matcher

PREFIX = "subset_"
"""Names of its metrics begin so."""


def subset_rows(gold_row_M: Tensor, num_entities: int, size: int, seed: int) -> list[int]:
    """kb rows, ascending: all golds, and so many others that there are `size`, the same draw in every epoch.

    Args:
        gold_row_M: kb rows int64 [M] of the validation mentions.
    """
    golds = gold_row_M.unique()
    generator = torch.Generator().manual_seed(draw(2**63, "validation entities", seed))
    order_E = torch.randperm(num_entities, generator=generator)
    others = order_E[~torch.isin(order_E, golds)]
    rows: list[int] = torch.cat([golds, others[: max(size - len(golds), 0)]]).sort().values.tolist()
    return rows


def validation_between(
    validation: Validation, size: int | None, seed: int
) -> Callable[[Matcher], Mapping[str, float]] | None:
    """What validates epochs between full validations, by `size` (`TrainConfig.validate_entities`).

    None: nothing does. Where the knowledge base has no more entities than that, all of it is ranked over.
    """
    if size is None:
        return None
    if size >= validation.num_entities:
        return validation
    rows = subset_rows(validation.gold_row_M, validation.num_entities, size, seed)
    return lambda matcher: {f"{PREFIX}{name}": value for name, value in validation.over(matcher, rows).items()}
