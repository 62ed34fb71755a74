"""Masks of token ids that were made by hand in CLIP's vocabulary."""

import torch
from torch import Tensor


def mask_to_end(token_ids: Tensor) -> Tensor:
    """bool [N, L]: True up to and including end-of-text, CLIP's highest id."""
    position_L = torch.arange(token_ids.shape[1], device=token_ids.device)
    return position_L <= token_ids.argmax(dim=1, keepdim=True)
