"""Transformer blocks of Hugging Face models of two towers: their names, and attention maps that are three tensors."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from dsmip.errors import UserError

BLOCK = re.compile(r"(text_model|vision_model)\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")
"""Tower, number, module in the block, and kind of a tensor."""
QUERY_KEY_VALUE = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
POSITION_NUMBERS = ("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids")
"""0, 1, 2 ...: older versions saved them as well."""


def joined(attention: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """One tensor of the query, key and value map of each block.

    Args:
        attention: The three by their names (`QUERY_KEY_VALUE`), by what they are called together.

    Raises:
        UserError: One is missing.
    """
    for together, maps in attention.items():
        if missing := [name for name in QUERY_KEY_VALUE if name not in maps]:
            raise UserError(f"weights have no {missing[0]} for {together}")
    return {together: torch.cat([maps[name] for name in QUERY_KEY_VALUE]) for together, maps in attention.items()}
