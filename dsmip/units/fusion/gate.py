"""The gate over fused experts: weights per mention from how sure each expert is, from the item, or from both.

M mentions, B experts, F inputs.
"""

import torch
from torch import Tensor, nn

from dsmip.data.table import Table
from dsmip.ops.experts.statistics import Survey, num_confidence

_LEAST_DEVIATION = 1e-3  # of an input that is the same for all mentions it was fitted on: it may not explode on others


class FusionGate(nn.Module):
    """log pi of B experts per mention: an MLP of two hidden layers on inputs of mean 0 and deviation 1.

    Attributes:
        sees_confidence: The numbers of `Survey.confidence_MF` are among its inputs.
        sees_items: So are the mention's text and picture features.
        normalises: False leaves its inputs as they are.
    """

    mean_F: Tensor
    deviation_F: Tensor

    def __init__(
        self,
        item_width: int,
        num_experts: int,
        width: int,
        dropout: float,
        *,
        sees_confidence: bool = True,
        sees_items: bool = False,
        normalises: bool = True,
    ) -> None:
        super().__init__()
        self.sees_confidence, self.sees_items, self.normalises = sees_confidence, sees_items, normalises
        num_inputs = sees_items * item_width + sees_confidence * num_confidence(num_experts)
        self.register_buffer("mean_F", torch.zeros(num_inputs))
        self.register_buffer("deviation_F", torch.ones(num_inputs))
        layers: list[nn.Module] = []
        for before in (num_inputs, width):
            layers += [nn.Linear(before, width), nn.LeakyReLU(), nn.Dropout(dropout)]
        self.mlp = nn.Sequential(*layers, nn.Linear(width, num_experts))

    def inputs(self, mentions: Table, survey: Survey) -> Tensor:
        """float32 [M, F], as they are: from the mentions' columns `text` and `picture`, and their survey."""
        seen = [survey.confidence_MF.float()] if self.sees_confidence else []
        if self.sees_items:
            seen += [mentions.dense(name).float() for name in ("text", "picture")]
        return torch.cat(seen, dim=1)

    def fit_normalisation(self, inputs_MF: Tensor) -> None:
        """Takes mean and deviation of the training mentions' inputs, if it normalises."""
        if not self.normalises:
            return
        self.mean_F.copy_(inputs_MF.mean(dim=0))
        self.deviation_F.copy_(inputs_MF.std(dim=0, correction=0).clamp_min(_LEAST_DEVIATION))

    def logits(self, inputs_MF: Tensor) -> Tensor:
        """log pi [M, B] but for a constant of each mention."""
        logits_MB: Tensor = self.mlp((inputs_MF - self.mean_F) / self.deviation_F)
        return logits_MB

    def forward(self, inputs_MF: Tensor) -> Tensor:
        """log pi [M, B]."""
        return torch.log_softmax(self.logits(inputs_MF), dim=-1)
