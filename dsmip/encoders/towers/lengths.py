"""Texts of like length through a tower together: on a CPU a batch then costs its own tokens, not its longest text's."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from dsmip.encoders.towers.base import TrunkFeatures

_TEXTS = 16  # of a group, at least: fewer leave a CPU's matrix products small


def by_length(
    trunk: Callable[[Tensor, Tensor], TrunkFeatures], token_ids: Tensor, mask: Tensor, places: int = 0
) -> TrunkFeatures:
    """What a trunk says of N texts, taken in groups by their lengths; padding has zeros for tokens.

    Texts of one length are in one group, so equal texts stay equal to the bit. On other devices than a CPU all go at
    once: there a group costs more than its padding.

    Args:
        trunk: A tower's, which does not read padding, from ids and mask of some texts.
        token_ids: int64 [N, L].
        mask: bool [N, L], False at padding, which comes last.
        places: Further ones that the trunk gives every text, for prompts.
    """
    if token_ids.device.type != "cpu" or len(token_ids) <= _TEXTS:
        return trunk(token_ids, mask)
    order_N = mask.sum(dim=1).argsort(stable=True)
    back_N, length = order_N.argsort(), token_ids.shape[1] + places
    unprojected, tokens, masks = list[Tensor](), list[Tensor](), list[Tensor]()
    for rows in order_N.split(_group_sizes(mask)):
        longest = int(mask[rows[-1]].sum())
        said = trunk(token_ids[rows, :longest], mask[rows, :longest])
        missing = length - said.tokens.shape[1]
        unprojected.append(said.unprojected)
        tokens.append(F.pad(said.tokens, (0, 0, 0, missing)))
        assert said.mask is not None
        masks.append(F.pad(said.mask, (0, missing)))
    return TrunkFeatures(torch.cat(unprojected)[back_N], torch.cat(tokens)[back_N], torch.cat(masks)[back_N])


def _group_sizes(mask: Tensor) -> list[int]:
    """Of the groups, shortest texts first: each ends where the length changes once it has enough."""
    sizes = [0]
    for count in mask.sum(dim=1).unique(return_counts=True)[1].tolist():
        if sizes[-1] >= _TEXTS:
            sizes.append(0)
        sizes[-1] += count
    return sizes
